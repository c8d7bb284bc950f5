"""From a batch to the logits that count, and their loss.

A causal model's logits are by far the largest tensor of a step (tokens x vocabulary), and only
those at positions with a label are wanted. So the hidden states are gathered just before the
output layer: whatever the architecture does to its logits afterwards (scaling, soft capping) is
done to the gathered ones.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loralab.adapters import use
from loralab.config import Task
from loralab.data import IGNORED, Batch, Encoded
from loralab.errors import ModelError
from loralab.fusion import HiddenStatesError, frozen_output_layer, stopped_at, token_nll_sum
from loralab.models import reads_last_token
from loralab.placement import send
from loralab.training.batches import batch_for
from loralab.training.methods import Trainable
from loralab.training.objective import Objective, Prediction
from loralab.training.padding import known_padding
from loralab.training.prefix import PrefixCache


@dataclass(frozen=True)
class TargetLogits:
    """The fp32 logits of every target of a batch.

    A target is a row (classification) or a token with a label (causal); `rows` says whose it is.
    """

    logits: Float[Tensor, "targets classes"]
    targets: Int[Tensor, " targets"]
    rows: Int[Tensor, " targets"]  # on the CPU

    def nll_sum(self) -> Float[Tensor, ""]:
        """The negative log-likelihood of all targets together, in nats."""
        return F.cross_entropy(self.logits, self.targets, reduction="sum")

    def nll(self) -> Float[Tensor, " targets"]:
        """The negative log-likelihood of each target, in nats."""
        return F.cross_entropy(self.logits, self.targets, reduction="none")


def objective_of(trainable: Trainable, *, prefix: PrefixCache | None = None) -> Objective:
    """What a run minimises."""
    model, task, route = trainable.model, trainable.task, trainable.route
    if callable(task):
        return task(model, route)
    return Forward(model, task, route=route, prefix=prefix)


class Forward:
    """Runs rows through a model along a route, and keeps the logits of their targets."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        route: str | None = None,
        prefix: PrefixCache | None = None,
    ) -> None:
        self.model = model
        self.task: Task = task
        self._route = route
        self._prefix = prefix
        self._device = next(model.parameters()).device
        self._fixed: dict[str, Any] = {}
        if "use_cache" in inspect.signature(model.forward).parameters:
            self._fixed["use_cache"] = False  # keys and values are of no use after one pass

    def __call__(self, rows: Sequence[Encoded]) -> TargetLogits:
        """One pass over `rows`, padded to the longest."""
        batch = batch_for(self.model, rows)
        with self._routed(), self._prefixed(rows), known_padding(rows):
            if self.task == "classification":
                return self._of_rows(batch)
            return self._of_tokens(batch)

    def nll_sum(self, rows: Sequence[Encoded]) -> Float[Tensor, ""]:
        """The negative log-likelihood of all targets of `rows`, for training.

        Of a frozen output layer no logits are made.
        """
        layer = self._frozen_output
        if layer is None:
            return self(rows).nll_sum()
        batch = batch_for(self.model, rows)
        flat, targets, _ = self._targets(batch)
        try:
            with self._routed(), self._prefixed(rows), known_padding(rows), stopped_at(layer):
                self._logits(batch)
        except HiddenStatesError as reached:
            hidden = reached.hidden.flatten(0, -2).index_select(0, flat)
            return token_nll_sum(hidden, layer, targets)
        raise ModelError(
            f"{type(self.model).__name__} never calls its output layer",
            "set model.task to 'classification', or choose a causal model.",
        )

    def answers(self, rows: Sequence[Encoded]) -> list[Prediction]:
        """What the model says about each row."""
        return _answers(self(rows), rows, self.task)

    @functools.cached_property
    def _frozen_output(self) -> nn.Linear | None:
        return frozen_output_layer(self.model) if self.task == "causal" else None

    def prepare(self) -> "Forward":
        """Look at the output layer now: it takes a forward of few tokens."""
        _ = self._frozen_output
        return self

    def read_positions(self, rows: Sequence[Encoded]) -> Int[Tensor, "rows read"] | None:
        """Where hidden states are read above the last block; None for everywhere.

        As many positions a row as the row with the most needs, so some that nobody reads.
        """
        if self.task == "classification" and not reads_last_token(self.model):
            return None
        needed = [_read_by_loss(row) for row in rows]
        width = max(len(row.input_ids) for row in rows)
        most = max(1, *map(len, needed))
        others = ([at for at in range(width) if at not in own] for own in map(set, needed))
        positions = [(own + rest)[:most] for own, rest in zip(needed, others, strict=True)]
        return send(torch.tensor(positions), self._device)

    def _of_rows(self, batch: Batch) -> TargetLogits:
        logits = self._logits(batch)
        return TargetLogits(
            logits.float(), send(batch.labels, self._device), torch.arange(len(batch.labels))
        )

    def _of_tokens(self, batch: Batch) -> TargetLogits:
        flat, targets, rows = self._targets(batch)
        with _gathered_before_output_layer(self.model, flat):
            logits = self._logits(batch)
        if logits.ndim == 3:  # the output layer was called on something else
            logits = logits.flatten(0, 1).index_select(0, flat)
        return TargetLogits(logits.float(), targets, rows)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of every labelled token: its flat position, its label, and its row (on the CPU)."""
        rows, positions = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        flat = rows * batch.input_ids.shape[1] + positions
        targets = batch.labels[rows, positions + 1]
        return send(flat, self._device), send(targets, self._device), rows

    def _logits(self, batch: Batch) -> Tensor:
        return self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **self._fixed,
        ).logits

    def _routed(self) -> AbstractContextManager[object]:
        return nullcontext() if self._route is None else use(self.model, self._route)

    def _prefixed(self, rows: Sequence[Encoded]) -> AbstractContextManager[object]:
        return nullcontext() if self._prefix is None else self._prefix.in_place_of(self.model, rows)


def _read_by_loss(row: Encoded) -> list[int]:
    """The positions of a row whose hidden states its loss reads."""
    if row.targets is None:
        return [len(row.input_ids) - 1]
    return [at for at, target in enumerate(row.targets[1:]) if target != IGNORED]


@contextmanager
def _gathered_before_output_layer(
    model: nn.Module, flat: Int[Tensor, " targets"]
) -> Iterator[None]:
    """The model's output layer sees only the hidden states at the flat positions."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise ModelError(
            f"{type(model).__name__} has no output layer, so it is no causal language model",
            "set model.task to 'classification', or choose a causal model.",
        )

    def gather(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *others = arguments
        if hidden.ndim != 3:
            return None
        return (hidden.flatten(0, 1).index_select(0, flat), *others)

    handle = layer.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _answers(scored: TargetLogits, rows: Sequence[Encoded], task: Task) -> list[Prediction]:
    choices = scored.logits.argmax(dim=-1)
    correct = (choices == scored.targets).tolist()
    nll = scored.nll().double().tolist()
    if task == "classification":
        probabilities = scored.logits.double().softmax(dim=-1).tolist()
        return [
            Prediction(
                row.id, row.group, row.label, choice, loss, 1, int(right), tuple(distribution)
            )
            for row, choice, loss, right, distribution in zip(
                rows, choices.tolist(), nll, correct, probabilities, strict=True
            )
        ]
    sums, hits, counts = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    for row, loss, right in zip(scored.rows.tolist(), nll, correct, strict=True):
        sums[row] += loss
        hits[row] += right
        counts[row] += 1
    return [
        Prediction(row.id, row.group, None, None, sums[i], counts[i], hits[i], None)
        for i, row in enumerate(rows)
    ]
