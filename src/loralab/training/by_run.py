"""The tokens of several runs one after another, and what a block treats run by run.

Linear layers, norms and activations treat tokens one by one and need not know of runs. Attention
and dropout do: inside `attention_by_run` each run's tokens go through its own, with its mask and
its random stream.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.data import Encoded
from loralab.errors import ModelError
from loralab.training.streams import RunStream

ATTENTION = "loralab_by_run"
_ALONE = "train the runs alone."


@dataclass
class Batch:
    """One run's rows on their way through the model."""

    name: str
    rows: Sequence[Encoded]
    start: int = 0  # of its tokens among all
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    attention: str = "sdpa"

    @property
    def hidden(self) -> Float[Tensor, "rows tokens width"]:
        """What the first block is given."""
        return hidden_of(*self.calls[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens)."""
        rows, tokens, _ = self.hidden.shape
        return rows, tokens

    @property
    def num_tokens(self) -> int:
        """Of all rows, with what they are padded by."""
        return math.prod(self.shape)

    def mask(self, block: int) -> Tensor | None:
        """The attention mask that the block of that number was given."""
        args, kwargs = self.calls[block]
        masks = (value for value in (*args, *kwargs.values()) if _is_mask(value, self))
        return next(masks, None)


def line_up(batches: Sequence[Batch]) -> None:
    """Give each batch its start: their tokens stand one after another."""
    start = 0
    for batch in batches:
        batch.start = start
        start += batch.num_tokens


def split(
    x: Shaped[Tensor, "tokens *rest"], batches: Sequence[Batch]
) -> tuple[Shaped[Tensor, "_ *rest"], ...]:
    """Each run's tokens. In one call: the gradient of a slice is as large as the whole."""
    return x.split([batch.num_tokens for batch in batches])


def segments(batches: Sequence[Batch]) -> Int[Tensor, "1 tokens"]:
    """The number of each token's run."""
    sizes = torch.tensor([batch.num_tokens for batch in batches])
    return torch.arange(len(batches)).repeat_interleave(sizes)[None]


@dataclass
class Place:
    """Where the runs' blocks are now, for what attention is called with."""

    batches: Sequence[Batch]
    random: Mapping[str, RunStream]
    block: int = 0

    def by_run(self, x: Shaped[Tensor, "1 tokens *rest"]) -> Iterator[tuple[Batch, Tensor]]:
        """Each run's part of the tokens, as its batch."""
        for batch, own in zip(self.batches, split(x[0], self.batches), strict=True):
            yield batch, own.unflatten(0, batch.shape)

    @contextmanager
    def drawing(self, batch: Batch) -> Iterator[None]:
        """Inside, the default generator is the run's."""
        if batch.name not in self.random:
            yield
            return
        with self.random[batch.name].as_default():
            yield


_place_now: ContextVar[Place] = ContextVar("the runs' blocks")


@contextmanager
def attention_by_run(
    layers: nn.ModuleList, batches: Sequence[Batch], random: Mapping[str, RunStream]
) -> Iterator[Place]:
    """Inside, the blocks' attention and dropouts treat each run's tokens by themselves."""
    place = Place(batches, random)
    token = _place_now.set(place)
    configs = {id(c): c for m in layers.modules() if (c := vars(m).get("config")) is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    dropouts = [m for m in layers.modules() if isinstance(m, nn.Dropout) and m.p and m.training]
    try:
        for config, _ in before:
            config._attn_implementation = ATTENTION
        for module in dropouts:
            vars(module)["forward"] = _dropping(module, place)
        yield place
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for module in dropouts:
            del vars(module)["forward"]
        _place_now.reset(token)


def _dropping(module: nn.Dropout, place: Place) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        found = []
        for batch, own in place.by_run(x):
            with place.drawing(batch):
                found.append(F.dropout(own, module.p, True).flatten(0, 1))
        return torch.cat(found)[None]

    return forward


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that each run would have alone; all are (1, heads, tokens, head_size)."""
    place = _place_now.get()
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own_tokens = [place.by_run(heads.transpose(1, 2)) for heads in (query, key, value)]
    outputs = []
    for (batch, q), (_, k), (_, v) in zip(*own_tokens, strict=True):
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(batch.attention, eager)
        heads = [each.transpose(1, 2) for each in (q, k, v)]
        with place.drawing(batch):
            output, _ = attend(module, *heads, batch.mask(place.block), **kwargs)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def joined(
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], x: Tensor, batches: Sequence[Batch]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a block for all runs: `x` first, what else is by token one after another.

    Masks are left out (attention takes each run's). Raises `ModelError` for what is neither.
    """
    args = [_join(values, batches) for values in zip(*(args for args, _ in calls), strict=True)]
    kwargs = {key: _join([named[key] for _, named in calls], batches) for key in calls[0][1]}
    if args:
        args[0] = x[None]
    else:
        kwargs["hidden_states"] = x[None]
    return args, kwargs


def _join(values: Sequence[Any], batches: Sequence[Batch]) -> Any:
    first = values[0]
    given = zip(values, batches, strict=True)
    if all(value is None or _is_mask(value, batch) for value, batch in given):
        return None
    if isinstance(first, tuple):
        return tuple(_join(each, batches) for each in zip(*values, strict=True))
    if not isinstance(first, Tensor):
        if any(type(value) is not type(first) for value in values):
            raise ModelError("the runs' blocks are called with different arguments", _ALONE)
        return first
    tokens = []
    for value, batch in zip(values, batches, strict=True):
        if value.ndim < 2 or value.shape[1] != batch.shape[1]:
            raise ModelError(f"a block is given a tensor of shape {tuple(value.shape)}", _ALONE)
        tokens.append(value.expand(batch.shape[0], *value.shape[1:]).flatten(0, 1))
    return torch.cat(tokens)[None]


def _is_mask(value: Any, batch: Batch) -> bool:
    rows, tokens = batch.shape
    is_tensor = isinstance(value, Tensor) and value.ndim == 4
    fits = is_tensor and value.shape[-1] == tokens and value.shape[-2] in (1, tokens)
    return fits and value.shape[0] in (1, rows)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]
