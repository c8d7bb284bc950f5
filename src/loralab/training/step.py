"""One optimiser step: gradients of a batch in pieces, then clip and move."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.config import TrainingSection
from loralab.data import Row
from loralab.errors import TrainingError
from loralab.fusion import Matched, fused, matching_blocks
from loralab.training.attention import training_attention
from loralab.training.batches import text_rows
from loralab.training.compiling import (
    INDUCTOR,
    Backend,
    CompileChoice,
    Regions,
    choose,
    examples,
    fits,
    regions,
)
from loralab.training.forward import Forward, objective_of
from loralab.training.methods import Trainable
from loralab.training.non_finite import blame
from loralab.training.objective import Objective
from loralab.training.offload import offloaded
from loralab.training.optimiser import Optimiser
from loralab.training.plan import lay_out
from loralab.training.readings import Reading
from loralab.training.streams import dropout_stream


@dataclass(frozen=True)
class Outcome:
    """What a step did: the loss is a mean over its targets, in nats."""

    loss: float
    grad_norm: float
    learning_rates: dict[str, float]
    rows: int
    tokens: int


@dataclass(frozen=True)
class Enqueued:
    """A step that the device is told to do; `Stepper.outcome` says what it did."""

    step: int
    rows: Sequence[Row]
    learning_rates: dict[str, float]
    reading: Reading  # of the loss and the gradient norm


class Stepper:
    """Does steps; `without_gradient` tells which parameters no gradient has ever reached."""

    def __init__(self, trainable: Trainable, optimiser: Optimiser, objective: Objective) -> None:
        self._trainable = trainable
        self._optimiser = optimiser
        self._objective = objective
        self._unreached = set(trainable.parameters)
        self._regions: Regions | None = None

    def compile(self, rows: Sequence[Row], backend: Backend = INDUCTOR) -> None:
        """From now on run the blocks compiled that no function of room fusion runs.

        They are compiled now, on batches of `rows`; neither weights nor random streams change.
        Raises `CompileError` where they cannot be.
        """
        self._regions = self.regions(backend)
        if not len(self._regions):
            return
        for batch in examples(rows, self._trainable.training.batch_size):
            self.try_out(batch)

    def regions(self, backend: Backend = INDUCTOR) -> Regions:
        """The blocks that `compile` compiles."""
        trainable = self._trainable
        if trainable.training.activation_checkpointing or trainable.training.offload_activations:
            return Regions(trainable.model, [], backend)  # masks of the second forward differ
        cached = trainable.training.cache_frozen_prefix and trainable.route is None
        first = trainable.num_frozen_blocks if cached else 0
        others = [each.module for each in self._fusible]
        return regions(trainable.model, others, first=first, backend=backend)

    def try_out(self, rows: Sequence[Row], *, compiled: bool = True) -> None:
        """A forward and backward of `rows` that leaves no trace."""
        model, kept = self._trainable.model, self._regions
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._regions = kept if compiled else None
        try:
            self.gradients(0, rows).item()
        finally:
            self._regions = kept
            self._optimiser.clear()
            for buffer, before in buffers:
                buffer.copy_(before)

    def step(self, step: int, rows: Sequence[Row], factor: float) -> Outcome:
        """Step number `step` on `rows`, with every learning rate times `factor`.

        Raises `TrainingError` where the loss or a gradient is not finite.
        """
        return self.outcome(self.conclude(step, rows, self.gradients(step, rows), factor))

    def gradients(self, step: int, rows: Sequence[Row]) -> Tensor:
        """The loss of `rows`, whose gradients are left at the parameters.

        It is the sum over all targets of the step divided by their number, whatever the pieces:
        accumulation equals the big batch.
        """
        training, total = self._trainable.training, total_targets(rows)
        if not self._trainable.model.training:  # which takes a while in Python
            self._trainable.model.train()
        with dropout_stream(training.seed, step, self._trainable.device):
            losses = (self._backward(piece, total) for piece in pieces_of(rows, training))
            return sum(losses, start=torch.zeros(()))

    def conclude(self, step: int, rows: Sequence[Row], loss: Tensor, factor: float) -> Enqueued:
        """Clip and move, given the loss and the gradients of `rows`; nobody waits for the device.

        Where a number is not finite nothing moves, now and in later steps: `outcome` says so.
        """
        grad_norm = self._optimiser.grad_norm()
        if step <= 2:
            self._note_gradients()
        numbers = torch.stack([loss, grad_norm.to(loss.device)])
        self._optimiser.halt_unless(numbers.isfinite().all())
        rates = self._optimiser.step(factor, grad_norm)
        return Enqueued(step, rows, rates, Reading(numbers))

    def outcome(self, enqueued: Enqueued) -> Outcome:
        """What the step did, as soon as the device has done it.

        Raises `TrainingError` where the loss or a gradient is not finite.
        """
        loss, grad_norm = enqueued.reading.numbers()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._blame(enqueued.step, enqueued.rows)
        return Outcome(
            loss=loss,
            grad_norm=grad_norm,
            learning_rates=enqueued.learning_rates,
            rows=len(enqueued.rows),
            tokens=sum(row.num_tokens for row in enqueued.rows),
        )

    def without_gradient(self) -> set[str]:
        """Parameters whose gradient was missing or exactly zero in both of the first two steps.

        Two steps, because B starts at zero and makes the gradient of A exactly zero in the first.
        """
        return set(self._unreached)

    @functools.cached_property
    def _fusible(self) -> list[Matched]:
        wanted = self._trainable.training.fuse_blocks and self._trainable.route is not None
        return matching_blocks(self._trainable.model) if wanted else []

    def _backward(self, piece: Sequence[Row], total: int) -> Tensor:
        # around backward too: activation checkpointing computes the forward again there
        width = max(row.num_tokens for row in piece)
        read = self._read_positions(piece)
        with ExitStack() as stack:
            stack.enter_context(training_attention(self._trainable.model, width))
            stack.enter_context(fused(self._fusible, read))
            stack.enter_context(self._compiled(piece))
            with self._offloaded():
                nll = self._objective.nll_sum(piece) / total
            if not nll.requires_grad:
                raise TrainingError(
                    "the loss depends on no trained tensor",
                    "target modules that the model calls: a weight that it reads past its module "
                    "cannot be adapted.",
                )
            nll.backward()
        return nll.detach().float()

    def _read_positions(self, piece: Sequence[Row]) -> Tensor | None:
        """Where the loss reads the output of the last of the fused blocks; None for everywhere."""
        objective = self._objective
        if not self._fusible or not isinstance(objective, Forward):
            return None
        return objective.read_positions(text_rows(piece))

    def _compiled(self, piece: Sequence[Row]) -> AbstractContextManager[object]:
        wanted = self._regions and fits(piece, self._trainable.training.batch_size)
        return self._regions.compiled() if self._regions and wanted else nullcontext()

    def _offloaded(self) -> AbstractContextManager[object]:
        """Where what the backward pass needs is kept: on the device, or on the host."""
        wanted = self._trainable.training.offload_activations
        return offloaded(self._trainable.model) if wanted else nullcontext()

    def _blame(self, step: int, rows: Sequence[Row]) -> TrainingError:
        def gradients() -> dict[str, Tensor | None]:
            self._optimiser.clear()
            self.gradients(step, rows)
            return self._optimiser.gradients()

        pieces = pieces_of(rows, self._trainable.training)
        return blame(self._trainable, self._objective, pieces, step, gradients)

    def _note_gradients(self) -> None:
        for name, gradient in self._optimiser.gradients().items():
            if gradient is not None and name in self._unreached and bool(gradient.any()):
                self._unreached.discard(name)


def pieces_of(rows: Sequence[Row], training: TrainingSection) -> list[Sequence[Row]]:
    """The rows of a step in pieces of `batch_size`, one forward and backward each."""
    size = training.batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def total_targets(rows: Sequence[Row]) -> int:
    """What the loss of a step is divided by."""
    return max(1, sum(row.num_targets for row in rows))


def choose_compile(
    trainable: Trainable, rows: Sequence[Row], *, backend: Backend = INDUCTOR
) -> CompileChoice:
    """Whether a training of `trainable` on `rows` is faster with compiled blocks, by trying.

    Neither weights nor random streams change. A run too short to gain costs nothing, or two passes.
    """
    training = trainable.training
    optimiser = Optimiser(trainable.groups, training)
    stepper = Stepper(trainable, optimiser, objective_of(trainable))
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    typical = [ordered[len(ordered) // 2]] * training.batch_size
    try:
        return choose(
            lambda compiled: stepper.try_out(typical, compiled=compiled),
            lambda: stepper.compile(rows, backend),
            num_regions=len(stepper.regions()),
            num_steps=lay_out(rows, training).total_steps,
            passes_per_step=training.accumulation,
        )
    finally:
        optimiser.close()


def repeatable_step(trainable: Trainable, *batches: Sequence[Row]) -> Callable[[], Outcome]:
    """A whole optimiser step at every call, on each of `batches` in turn, for meters.

    It changes the trained weights, and holds what a training holds between steps: the optimiser's
    state, and no gradients.
    """
    optimiser = Optimiser(trainable.groups, trainable.training)
    stepper = Stepper(trainable, optimiser, objective_of(trainable))
    turns = enumerate(itertools.cycle(batches), start=1)

    def step() -> Outcome:
        number, rows = next(turns)
        return stepper.step(number, rows, 1.0)

    return step
