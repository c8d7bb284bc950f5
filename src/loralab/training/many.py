"""Many trainings in one pass: LoRA runs over one frozen base, each as it would be alone.

Every run keeps its own data order, dropout stream, optimiser, schedule, clipping, early stop,
journals and checkpoints: what it writes can be resumed as a run alone, and the other way round.
Only the forward and backward passes are shared (see `together`). Where the model cannot be run that
way the runs take turns step by step, which saves memory and no time.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralab.config import MethodSection, Task, TrainingSection
from loralab.data import Row
from loralab.errors import TrainingError
from loralab.models import redraw_head
from loralab.training.checkpoints import CheckpointFolder
from loralab.training.doctor import check, examine_setup
from loralab.training.events import Event, Validated
from loralab.training.identity import frozen_hash
from loralab.training.interrupts import InterruptFlag
from loralab.training.loop import Fit
from loralab.training.methods import Trainable, prepare
from loralab.training.objective import Joint, MakesJoint, MakesObjective
from loralab.training.prefix import PrefixStore
from loralab.training.step import pieces_of, total_targets
from loralab.training.streams import RunStream, stream_seed
from loralab.training.together import Together

SHARED = ("device", "threads", "fuse_blocks", "activation_checkpointing", "offload_activations")
"""Settings of `[training]` that runs in one pass must have alike."""

RUNGS = (0.25, 0.5)
"""Shares of a run after which successive halving (1502.07943) stops the worse half."""


@dataclass(frozen=True)
class Failed:
    """A run that ended in numbers that are none; the others go on."""

    error: TrainingError


@dataclass(frozen=True)
class Stopped:
    """A run that successive halving ended, since half of the others were better."""

    step: int
    nll: float


def prepare_many(
    model: nn.Module,
    settings: Sequence[tuple[MethodSection, TrainingSection]],
    *,
    task: Task | MakesObjective,
    rows: Sequence[Row] = (),
    starts: Sequence[Path | None] = (),
    names: Sequence[str] = (),
) -> list[Trainable]:
    """An adapter in `model` for each of the settings, all of kind "lora". As `prepare`.

    names: what the adapters are called.
    """
    found = []
    for number, (method, training) in enumerate(settings):
        if isinstance(model, PreTrainedModel):
            redraw_head(model, stream_seed(training.seed, "initialisation"))
        start = starts[number] if starts else None
        name = names[number] if names else f"run-{number}"
        trainable = prepare(model, method, training, task=task, rows=rows, start=start, name=name)
        found.append(replace(trainable, base_hash=frozen_hash(trainable)))
    return found


def fit_many(
    trainables: Sequence[Trainable],
    train_rows: Sequence[Sequence[Row]],
    validation_rows: Sequence[Sequence[Row]],
    folders: Sequence[Path],
    *,
    halving: bool = False,
) -> Iterator[tuple[int, Event | Failed | Stopped]]:
    """As `fit` for each of the trainables of `prepare_many`: (number of the run, event).

    Each run has its rows and its folder. Runs that go on start at the newest step that all of them
    have kept: what shares a pass decides the last bits. A run whose loss is no number is `Failed`;
    the others go on. With `halving` the worse half by validation nll stops after a quarter and
    after half of the steps, at the first validation from there on that all runs have had.

    Raises `Interrupted` after Ctrl-C, when every run has a checkpoint; otherwise as `fit`.
    """
    findings = [
        examine_setup(trainable, rows)
        for trainable, rows in zip(trainables, train_rows, strict=True)
    ]
    for own in findings:
        check(own)
    _line_up(folders)
    with ExitStack() as stack:
        interrupt = stack.enter_context(InterruptFlag())
        fits = [
            Fit(trainable, rows, held_out, folder, stack, interrupt)
            for trainable, rows, held_out, folder in zip(
                trainables, train_rows, validation_rows, folders, strict=True
            )
        ]
        for number, fit in enumerate(fits):
            yield number, fit.started(findings[number])
            fit.prepare(PrefixStore())
        yield from _Many(trainables, fits, interrupt, halving).steps()


class _Many:
    """Runs under way."""

    def __init__(
        self,
        trainables: Sequence[Trainable],
        fits: Sequence[Fit],
        interrupt: InterruptFlag,
        halving: bool,
    ) -> None:
        self._trainables = trainables
        self._fits = fits
        self._interrupt = interrupt
        self._rungs = list(RUNGS) if halving else []
        self._active = {n for n, fit in enumerate(fits) if not fit.is_over}
        self._nll: dict[int, dict[int, float]] = {n: {} for n in self._active}
        self._together = _together(trainables)

    def steps(self) -> Iterator[tuple[int, Event | Failed | Stopped]]:
        """Steps of all runs, until none is left; a run that is over is finished at once."""
        for number in set(range(len(self._fits))) - self._active:
            yield number, self._fits[number].finish()
        while self._active:
            began = time.perf_counter()
            rows = {n: self._fits[n].next_rows() for n in sorted(self._active)}
            losses = self._gradients(rows)
            seconds = time.perf_counter() - began
            for number, own in rows.items():
                yield from self._advance(number, own, losses[number], seconds / len(rows))
            yield from self._halve()
            over = [n for n in sorted(self._active) if self._fits[n].is_over]
            if over:  # the pass changes: what goes on later must begin with the same company
                yield from self._pause()
            for number in over:
                self._active.discard(number)
                yield number, self._fits[number].finish()
            if self._interrupt.asked:
                yield from self._pause()
                raise self._fits[0].interrupted()

    def _pause(self) -> Iterator[tuple[int, Event]]:
        for number in sorted(self._active):
            yield from ((number, event) for event in self._fits[number].pause())

    def _advance(
        self, number: int, rows: Sequence[Row], loss: Tensor, share: float
    ) -> Iterator[tuple[int, Event | Failed]]:
        try:
            for event in self._fits[number].advance(rows, loss, time.perf_counter() - share):
                if isinstance(event, Validated):
                    self._nll[number][event.step] = event.nll
                yield number, event
        except TrainingError as error:
            self._active.discard(number)
            yield number, Failed(error)

    def _gradients(self, rows: dict[int, list[Row]]) -> dict[int, Tensor]:
        """Each run's loss, its gradients left at its parameters."""
        if self._together is None or len(rows) == 1:
            return {n: self._alone(n, own) for n, own in rows.items()}
        model = self._trainables[0].model
        model.train()
        random, losses, pieces, totals = {}, {}, {}, {}
        for n, own in rows.items():
            training = self._trainables[n].training
            random[n] = RunStream(
                training.seed, self._fits[n].next_step, self._trainables[n].device
            )
            pieces[n], totals[n] = pieces_of(own, training), total_targets(own)
            losses[n] = torch.zeros(())
        for turn in zip_longest(*pieces.values()):
            given = {n: piece for n, piece in zip(pieces, turn, strict=True) if piece is not None}
            sums = self._together.nll_sums(
                {self._route(n): piece for n, piece in given.items()},
                {self._route(n): random[n] for n in given},
            )
            means = {n: sums[self._route(n)] / totals[n] for n in given}
            torch.stack(list(means.values())).sum().backward()
            for n, mean in means.items():
                losses[n] = losses[n] + mean.detach().float()
        return losses

    def _alone(self, number: int, rows: Sequence[Row]) -> Tensor:
        fit = self._fits[number]
        return fit.stepper.gradients(fit.next_step, rows)

    def _route(self, number: int) -> str:
        return str(self._trainables[number].route)

    def _halve(self) -> Iterator[tuple[int, Stopped]]:
        """At a rung: stop the worse half of the runs that are left."""
        runs = sorted(self._active)
        if not self._rungs or len(runs) < 2:
            return
        reached = [self._best_validation(n, self._rungs[0]) for n in runs]
        if any(nll is None for nll in reached):
            return
        self._rungs.pop(0)
        ranked = sorted(zip(reached, runs, strict=True))
        for nll, number in ranked[math.ceil(len(ranked) / 2) :]:
            fit = self._fits[number]
            fit.stop_early()
            if nll is not None and fit.progress.stopped_early:
                yield number, Stopped(fit.progress.step, nll)

    def _best_validation(self, number: int, share: float) -> float | None:
        """The run's lowest nll so far, where it has had a validation after that share of it."""
        found = self._nll[number]
        late = any(step >= share * self._fits[number].total for step in found)
        return min(found.values()) if late else None


def _line_up(folders: Sequence[Path]) -> None:
    """Bring unfinished runs back to the newest step that all of them have kept, if there is one.

    After a kill some are a checkpoint ahead of the others.
    """
    kept = [CheckpointFolder(folder / "checkpoints") for folder in folders]
    newest = [folder.newest() for folder in kept]
    waiting = [
        folder
        for folder, saved in zip(kept, newest, strict=True)
        if saved is None or not saved.progress.finished
    ]
    common = set[int].intersection(*(folder.steps() for folder in waiting)) if waiting else None
    if common:
        for folder in waiting:
            folder.forget_after(max(common))


def _together(trainables: Sequence[Trainable]) -> Joint | None:
    """How to run them at once, where that gives what each would compute alone."""
    first = trainables[0]
    if first.training.activation_checkpointing or first.training.offload_activations:
        return None
    if any(t.method.dora or t.method.biases != "none" for t in trainables):
        return None
    if callable(first.task):
        if not isinstance(first.task, MakesJoint) or any(t.method.dropout for t in trainables):
            return None
        return first.task.joint(first.model)
    return Together.of(first.model, first.task, fuse_blocks=first.training.fuse_blocks)
