"""Many trainings in one pass: LoRA runs over one frozen base, each as it would be alone.

Every run keeps its own data order, dropout stream, optimiser, schedule, clipping, early stop,
journals and checkpoints: what it writes can be resumed as a run alone, and the other way round.
Only the forward and backward passes are shared (see `together`). Where the model cannot be run that
way the runs take turns step by step, which saves memory and no time.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from loralab.config import MethodSection, Task, TrainingSection
from loralab.data import Row
from loralab.errors import TrainingError
from loralab.models import redraw_head
from loralab.training.checkpoints import CheckpointFolder
from loralab.training.doctor import check, examine_setup
from loralab.training.events import Event
from loralab.training.halving import Contender, losers
from loralab.training.identity import frozen_hash
from loralab.training.interrupts import InterruptFlag
from loralab.training.loop import Fit
from loralab.training.methods import Trainable, prepare
from loralab.training.objective import MakesObjective
from loralab.training.prefix import PrefixStore
from loralab.training.shared_step import SharedStep
from loralab.training.step import Enqueued
from loralab.training.streams import stream_seed

SHARED = (
    "device",
    "threads",
    "fuse_blocks",
    "activation_checkpointing",
    "offload_activations",
    "memory_plan",
)
"""Settings of `[training]` that runs in one pass must have alike."""


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
    ended: Sequence[Contender] = (),
) -> Iterator[tuple[int, Event | Failed | Stopped]]:
    """As `fit` for each of the trainables of `prepare_many`: (number of the run, event).

    Each run has its rows and its folder. Runs that go on start at the newest step that all of them
    have kept: what shares a pass decides the last bits. A run whose loss is no number is `Failed`;
    the others go on. With `halving` the worse half by validation nll stops after a quarter and
    after half of the steps, at the first validation from there on that all runs have had; `ended`
    are runs of the same contest that ended before.

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
        names = [folder.name for folder in folders]
        yield from _Many(trainables, fits, names, interrupt, halving, ended).steps()


class _Many:
    """Runs under way."""

    def __init__(
        self,
        trainables: Sequence[Trainable],
        fits: Sequence[Fit],
        names: Sequence[str],
        interrupt: InterruptFlag,
        halving: bool,
        ended: Sequence[Contender],
    ) -> None:
        self._fits = fits
        self._names = names
        self._interrupt = interrupt
        self._halving = halving
        self._ended = ended
        self._active = {n for n, fit in enumerate(fits) if not fit.is_over}
        self._failed: set[int] = set()
        self._shared = SharedStep(trainables, [fit.stepper for fit in fits])

    def steps(self) -> Iterator[tuple[int, Event | Failed | Stopped]]:
        """Steps of all runs, until none is left; a run that is over is finished at once."""
        for number in set(range(len(self._fits))) - self._active:
            yield number, self._fits[number].finish()
        yield from self._end()  # a kill may have come between a decision and its run's end
        while self._active:
            began = time.perf_counter()
            rows = {n: self._fits[n].next_rows() for n in sorted(self._active)}
            losses = self._shared.gradients({n: self._fits[n].next_step for n in rows}, rows)
            enqueued = {n: self._fits[n].enqueue(own, losses[n]) for n, own in rows.items()}
            for own in enqueued.values():
                own.reading.wait()
            share = (time.perf_counter() - began) / len(rows)
            for number, own in enqueued.items():
                yield from self._advance(number, own, share)
            yield from self._end()
            if self._interrupt.asked:
                yield from self._pause()
                raise self._fits[0].interrupted()

    def _end(self) -> Iterator[tuple[int, Event | Stopped]]:
        """Finish the runs that are over, and those that halving stops."""
        yield from self._halve()
        over = [n for n in sorted(self._active) if self._fits[n].is_over]
        if over:  # the pass changes: what goes on later must begin with the same company
            yield from self._pause()
        for number in over:
            self._active.discard(number)
            yield number, self._fits[number].finish()

    def _pause(self) -> Iterator[tuple[int, Event]]:
        for number in sorted(self._active):
            yield from ((number, event) for event in self._fits[number].pause())

    def _advance(
        self, number: int, enqueued: Enqueued, seconds: float
    ) -> Iterator[tuple[int, Event | Failed]]:
        try:
            for event in self._fits[number].advance(enqueued, seconds):
                yield number, event
        except TrainingError as error:
            self._active.discard(number)
            self._failed.add(number)
            yield number, Failed(error)

    def _halve(self) -> Iterator[tuple[int, Stopped]]:
        """Stop the runs whose last step the halving has decided on."""
        if not self._halving:
            return
        found = losers([*map(self._contender, range(len(self._fits))), *self._ended])
        for number, stop in found.items():
            if number not in self._active or self._fits[number].progress.step < stop.step:
                continue
            self._fits[number].stop_early()
            if self._fits[number].progress.stopped_early:
                yield number, Stopped(stop.step, stop.nll)

    def _contender(self, number: int) -> Contender:
        fit = self._fits[number]
        done = fit.progress.step
        return Contender(
            name=self._names[number],
            total_steps=fit.total,
            validations={row["step"]: row["nll"] for row in fit.progress.validations},
            ended_at=done + 1 if number in self._failed else done if fit.is_over else None,
        )


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
