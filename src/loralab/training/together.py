"""Several runs through one model: embeddings and heads run by run, the blocks for all at once.

The tokens of all runs' batches stand one after another, (1, tokens, width), each run's batch padded
as it would be alone. What treats tokens one by one (linear layers, norms, activations) is computed
for all of them; attention, dropout and low-rank pairs are each run's own. A batch of four rows is
too small for efficient matrix products; those of eight runs are not.

Everything is the model's own code: its forward is stopped before the first block, where masks and
positions are noted for every block, and goes on after the last with that run's hidden states. A
model is tried first; where its blocks give something else this way, there is no `Together`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import declare_tokens, hosted, streams, use
from loralab.config import Task
from loralab.data import Encoded
from loralab.errors import ModelError
from loralab.fusion import Matched, agrees, matching_blocks, own_modules, read_call, run_fused
from loralab.models import blocks, evaluating
from loralab.training.attention import training_attention
from loralab.training.by_run import (
    Batch,
    attention_by_run,
    hidden_of,
    joined,
    line_up,
    segments,
    split,
)
from loralab.training.forward import Forward
from loralab.training.streams import RunStream

TRIED = (((5, 3), 5), ((4, 4, 2), 4))
"""Lengths of rows and width of the two batches that a model is tried with."""


class _ReachedError(Exception):
    """Ends a forward at the last block: its inputs are known."""


class Together:
    """Training forwards of several runs whose adapters one model hosts."""

    def __init__(self, model: nn.Module, task: Task, layers: nn.ModuleList) -> None:
        self._model = model
        self._task: Task = task
        self._layers = layers
        self._forwards: dict[str, Forward] = {}
        self._matched: dict[nn.Module, Matched] = {}

    @staticmethod
    def of(model: nn.Module, task: Task, *, fuse_blocks: bool = True) -> "Together | None":
        """For a model whose blocks can be run this way, None for any other.

        Costs a few forwards of few tokens.
        """
        layers = _layers(model)
        if layers is None or not _tried(model, layers):
            return None
        path = blocks(model)[0]
        declare_tokens(model, path)
        together = Together(model, task, layers)
        if fuse_blocks:
            together._matched = {match.module: match for match in matching_blocks(model)}
        return together

    def nll_sums(
        self, rows: Mapping[str, Sequence[Encoded]], random: Mapping[str, RunStream]
    ) -> dict[str, Float[Tensor, ""]]:
        """The nll of all targets of each adapter's rows, in nats.

        random: each adapter's stream, which dropout draws from in the order of a run alone.
        """
        batches, before = [], {}
        for name, own in rows.items():
            before[name] = random[name].state()
            batches.append(self._enter(Batch(name, own), random[name]))
        line_up(batches)
        x = torch.cat([batch.hidden.flatten(0, 1) for batch in batches])
        names = [batch.name for batch in batches]
        generators = {name: random[name].generator for name in names}
        with use(self._model, names, segments=segments(batches)), streams(generators):
            x = self._run_blocks(x, batches, random)
        return {
            batch.name: self._leave(batch, own, random[batch.name], before[batch.name])
            for batch, own in zip(batches, split(x, batches), strict=True)
        }

    def _enter(self, batch: Batch, stream: RunStream) -> Batch:
        """The run's forward up to the blocks."""
        forward, note = self._forward(batch.name), _Note(batch, len(self._layers))
        config: Any = self._model.config
        width = max(len(row.input_ids) for row in batch.rows)
        with stream.as_default(), training_attention(self._model, width):
            batch.attention = config._attn_implementation
            with stood_in(self._layers, note):
                try:
                    forward.nll_sum(batch.rows)
                except _ReachedError:
                    return batch
        raise ModelError(
            f"{type(self._model).__name__} never calls its last block", "train the runs alone."
        )

    def _leave(
        self, batch: Batch, hidden: Tensor, stream: RunStream, before: Tensor
    ) -> Float[Tensor, ""]:
        """The run's forward from the last block on. What comes before draws what it drew before."""
        after = stream.state()
        stream.set_state(before)
        last = len(self._layers) - 1
        hidden = hidden.view(*batch.shape, -1)

        def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if number < last:
                return hidden_of(args, kwargs)
            stream.set_default_state(after)
            return hidden

        with stream.as_default(), stood_in(self._layers, stand_in):
            return self._forward(batch.name).nll_sum(batch.rows)

    def _run_blocks(
        self, x: Tensor, batches: Sequence[Batch], random: Mapping[str, RunStream]
    ) -> Float[Tensor, "tokens width"]:
        with attention_by_run(self._layers, batches, random) as at:
            for number, layer in enumerate(self._layers):
                at.block = number
                x = self._run_block(number, layer, x, batches)
        return x

    def _run_block(
        self, number: int, layer: nn.Module, x: Tensor, batches: Sequence[Batch]
    ) -> Float[Tensor, "tokens width"]:
        matched = self._matched.get(layer)
        calls = [read_call(*batch.calls[number]) for batch in batches] if matched else []
        if matched is not None and all(calls):
            pieces = [
                call.piece(batch.start, self._wanted(batch) if matched.is_last else None)
                for call, batch in zip(calls, batches, strict=True)
                if call is not None
            ]
            with stood_in_for(layer, lambda *_args, **_kwargs: run_fused(matched, x, pieces)):
                y = layer(x)  # through the module: whoever watches it sees it run
            if y is not None:
                return y
        args, kwargs = joined([batch.calls[number] for batch in batches], x, batches)
        return layer(*args, **kwargs)[0]

    def _wanted(self, batch: Batch) -> Tensor | None:
        return self._forward(batch.name).read_positions(batch.rows)

    def _forward(self, name: str) -> Forward:
        if name not in self._forwards:
            route = name if name in hosted(self._model) else None
            self._forwards[name] = Forward(self._model, self._task, route=route).prepare()
        return self._forwards[name]


class _Note:
    """In the place of the blocks: hands on what it is given, notes how each was called."""

    def __init__(self, batch: Batch, num_layers: int) -> None:
        self._batch, self._last = batch, num_layers - 1

    def __call__(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self._batch.calls.append((args, kwargs))
        if number == self._last:
            raise _ReachedError
        return hidden_of(args, kwargs)


@contextmanager
def stood_in_for(layer: nn.Module, function: Callable[..., Tensor | None]) -> Iterator[None]:
    """Inside, `function` runs in the place of the block."""
    vars(layer)["forward"] = function
    try:
        yield
    finally:
        del vars(layer)["forward"]


@contextmanager
def stood_in(
    layers: nn.ModuleList, function: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]
) -> Iterator[None]:
    """Inside, `function(number, args, kwargs)` runs in the place of each block."""

    def forward_of(number: int) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: function(number, args, kwargs)

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(stood_in_for(layer, forward_of(number)))
        yield


def _layers(model: nn.Module) -> nn.ModuleList | None:
    """The model's blocks, where all that drops inside them is a module or attention's."""
    if not hasattr(getattr(model, "config", None), "_attn_implementation"):
        return None
    try:
        layers = blocks(model)[1]
    except ModelError:
        return None
    for module in own_modules(layers):
        rates = {name: rate for name, rate in vars(module).items() if "dropout" in name}
        rates.pop("attention_dropout", None)
        if any(isinstance(rate, float) and rate > 0 for rate in rates.values()):
            return None
    return layers


def _tried(model: nn.Module, layers: nn.ModuleList) -> bool:
    """Whether the blocks give together what they give batch by batch."""
    with evaluating(model), torch.no_grad(), use(model, None):
        trials = [_trial(model, layers, *sizes) for sizes in TRIED]
        batches = [batch for batch, _ in trials]
        if not all(isinstance(end, Tensor) and batch.calls for batch, end in trials):
            return False
        line_up(batches)
        x = torch.cat([batch.hidden.flatten(0, 1) for batch in batches])
        try:
            with attention_by_run(layers, batches, {}) as place:
                for number, layer in enumerate(layers):
                    place.block = number
                    args, kwargs = joined([b.calls[number] for b in batches], x, batches)
                    x = layer(*args, **kwargs)[0]
        except Exception:  # whatever a model of another kind trips over
            return False
    wanted = torch.cat([end.flatten(0, 1) for _, end in trials])
    return x.shape == wanted.shape and agrees(x, wanted)


def _trial(
    model: nn.Module, layers: nn.ModuleList, lengths: Sequence[int], width: int
) -> tuple[Batch, Any]:
    """A batch up to the blocks, and what the last block gives for it alone."""
    config: Any = model.config
    batch = Batch("", (), attention=config._attn_implementation)
    inputs = _few_tokens(model, lengths, width)
    ends: list[Any] = []
    handle = layers[-1].register_forward_hook(lambda _module, _args, output: ends.append(output))
    try:
        model(**inputs)
    finally:
        handle.remove()
    with stood_in(layers, _Note(batch, len(layers))), suppress(_ReachedError):
        model(**inputs)
    return batch, ends[-1]


def _few_tokens(model: nn.Module, lengths: Sequence[int], width: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    mask = torch.tensor([[int(at < length) for at in range(width)] for length in lengths])
    ids = torch.arange(mask.numel()).view(mask.shape) % 50
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
