"""The training loop: a generator that does the work between the events it yields."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from loralab.data import Row
from loralab.errors import Interrupted, TrainingError
from loralab.training.batches import text_rows
from loralab.training.checkpoints import Checkpoint, CheckpointFolder, Progress, check_identity
from loralab.training.doctor import check, examine_gradients, examine_setup
from loralab.training.events import (
    CheckpointSaved,
    Event,
    Examined,
    Finding,
    Finished,
    Started,
    StepDone,
    Validated,
)
from loralab.training.forward import objective_of
from loralab.training.identity import identity
from loralab.training.interrupts import InterruptFlag
from loralab.training.journal import Journal
from loralab.training.methods import Trainable
from loralab.training.objective import accuracy, mean_nll
from loralab.training.optimiser import Optimiser
from loralab.training.plan import lay_out
from loralab.training.predict import predict_with
from loralab.training.prefix import PrefixStore, prefix_cache
from loralab.training.schedule import build_schedule
from loralab.training.step import Enqueued, Stepper

EXAMINED_STEPS = 2


def fit(
    trainable: Trainable,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    folder: Path,
    *,
    prefixes: PrefixStore | None = None,
) -> Iterator[Event]:
    """Train, validate, keep checkpoints; at the end the model holds its best weights.

    `folder` gets `checkpoints/`, `metrics.jsonl` (the same bytes whether the run was interrupted
    or not) and `timing.jsonl` (seconds). Where `folder/checkpoints` holds a checkpoint the run
    goes on from it. `prefixes` lets runs that share a base and rows share what
    `training.cache_frozen_prefix` keeps. Without validation rows the last weights are the best.

    The first Ctrl-C ends the run after a whole step: a checkpoint is saved and `Interrupted`
    raised. `training.compile = "auto"` is for `choose_compile` to settle; here it is "off".

    Raises `DataError` without rows, `ResumeError` where the bits would differ, `TrainingError` for
    a setting or a number that makes the run worthless, `CompileError` where blocks that are to be
    compiled cannot be, `OutputError` where `folder` cannot be written.
    """
    findings = examine_setup(trainable, train_rows)
    check(findings)
    with ExitStack() as stack:
        interrupt = stack.enter_context(InterruptFlag())
        run = Fit(trainable, train_rows, validation_rows, folder, stack, interrupt)
        yield run.started(findings)
        run.prepare(PrefixStore() if prefixes is None else prefixes)
        run.compile()
        yield from run.steps()
        finished = run.finish()
        if interrupt.asked:
            raise run.interrupted()
        yield finished


class Fit:
    """One run under way; what it opens is closed by `stack`."""

    def __init__(
        self,
        trainable: Trainable,
        train_rows: Sequence[Row],
        validation_rows: Sequence[Row],
        folder: Path,
        stack: ExitStack,
        interrupt: InterruptFlag,
    ) -> None:
        self._trainable = trainable
        self._training = trainable.training
        self._train_rows = train_rows
        self._validation_rows = validation_rows
        self._plan = lay_out(train_rows, self._training)
        self._schedule = build_schedule(self._training, self._plan.total_steps)
        self._identity = identity(trainable, train_rows, validation_rows, self._plan)
        self._checkpoints = CheckpointFolder(folder / "checkpoints")
        saved = self._checkpoints.newest()
        if saved is None:
            saved = Checkpoint(Progress(), self._identity)
        check_identity(saved.identity, self._identity)
        self._interrupt = interrupt
        self._metrics = stack.enter_context(
            closing(Journal(folder / "metrics.jsonl", saved.metrics))
        )
        self._timing = stack.enter_context(closing(Journal(folder / "timing.jsonl", saved.timing)))
        self._optimiser = Optimiser(trainable.groups, self._training)
        stack.callback(self._optimiser.close)
        self.progress = saved.progress
        self._first = saved.progress.step + 1
        self._num_enqueued = saved.progress.step
        self._best = saved.best
        self._batches = self._remaining_batches()
        self._saved_step = 0
        if saved.state:
            self._restore(saved.state)

    def started(self, findings: Sequence[Finding]) -> Started:
        """What is known before the first step."""
        return Started(
            step=self.progress.step,
            total_steps=self._plan.total_steps,
            steps_per_epoch=self._plan.steps_per_epoch,
            warmup_steps=self._schedule.warmup_steps,
            order_hash=self._identity["data"]["order_hash"],
            environment=self._identity["environment"],
            findings=tuple(findings),
        )

    def prepare(self, prefixes: PrefixStore) -> None:
        """Run the frozen blocks where their outputs are to be kept."""
        rows = [*self._train_rows, *self._validation_rows]
        is_kept = not self.progress.finished and not callable(self._trainable.task)
        prefix = prefix_cache(self._trainable, text_rows(rows), prefixes) if is_kept else None
        self._objective = objective_of(self._trainable, prefix=prefix)
        self.stepper = Stepper(self._trainable, self._optimiser, self._objective)

    def compile(self) -> None:
        """Compile the blocks where the settings say so."""
        if self._training.compile == "on" and not self.is_over:
            self.stepper.compile(self._train_rows)

    def steps(self) -> Iterator[Event]:
        """The steps that are not done yet, with validations and checkpoints between them.

        A device that lags behind is given the next step before the last one is read.
        """
        enqueued: deque[Enqueued] = deque()
        since = time.perf_counter()  # what is read next is paid for from here on
        while not self.is_over:
            if not enqueued:
                since = time.perf_counter()
            rows = self.next_rows()
            enqueued.append(self.enqueue(rows, self.stepper.gradients(self.next_step, rows)))
            while enqueued and self._is_read_now(enqueued):
                first = enqueued.popleft()
                first.reading.wait()
                began, since = since, time.perf_counter()
                yield from self.advance(first, since - began)
            if self._interrupt.asked and not (enqueued or self.is_over):
                yield from self.pause()
                raise self.interrupted()

    @property
    def next_step(self) -> int:
        """The number of the step that comes next, from 1."""
        return self._num_enqueued + 1

    @property
    def total(self) -> int:
        """How many steps the whole run has."""
        return self._plan.total_steps

    @property
    def is_over(self) -> bool:
        """Whether no step is left to be done."""
        progress = self.progress
        return (
            progress.finished or progress.stopped_early or progress.step == self._plan.total_steps
        )

    def next_rows(self) -> list[Row]:
        """The rows of the next step; to be asked once a step."""
        return [self._train_rows[index] for index in next(self._batches)]

    def enqueue(self, rows: Sequence[Row], loss: Tensor) -> Enqueued:
        """The next step, given the loss and the gradients of `rows`; nobody waits for it."""
        step = self.next_step
        self._num_enqueued = step
        return self.stepper.conclude(step, rows, loss, self._schedule.factor(step))

    def advance(self, enqueued: Enqueued, seconds: float) -> Iterator[Event]:
        """What the step did, in so many seconds, and what follows it."""
        step = enqueued.step
        yield self._tell(enqueued, seconds)
        self.progress.step = step
        if step == EXAMINED_STEPS and self._first == 1:
            yield self._examine(step)
        if step in self._plan.validation_steps and self._validation_rows:
            yield self._validate(step)
        if self._is_patience_spent():
            self.stop_early()
        if not self.is_over and step % self._training.checkpoint_steps == 0:
            yield self._save()

    def stop_early(self) -> None:
        """End the run after the step that was done last."""
        self.progress.stopped_early = self.progress.step < self._plan.total_steps

    def pause(self) -> Iterator[Event]:
        """Keep a checkpoint of the step that was done last."""
        if self._saved_step != self.progress.step:
            yield self._save()

    def finish(self) -> Finished:
        """Put the best weights into the model and mark the run as finished."""
        if self._best:
            self._optimiser.set_trained(self._best)
        progress = self.progress
        if not progress.finished:
            progress.finished = True
            progress.best_step = progress.best_step or progress.step
            self._best = self._best or _copies(self._optimiser.trained())
            self._save()
        best = next((v for v in progress.validations if v["step"] == progress.best_step), {})
        return Finished(
            step=progress.step,
            best_step=progress.best_step,
            best_nll=best.get("nll"),
            best_accuracy=best.get("accuracy"),
            stopped_early=progress.stopped_early,
        )

    def _is_read_now(self, enqueued: Sequence[Enqueued]) -> bool:
        """Whether the first step is read before another is enqueued: it has come, or is awaited."""
        step = enqueued[0].step
        return (
            len(enqueued) > 1
            or enqueued[0].reading.has_arrived
            or self._interrupt.asked
            or step in (EXAMINED_STEPS, self._plan.total_steps)
            or step in self._plan.validation_steps
            or step % self._training.checkpoint_steps == 0
        )

    def _tell(self, enqueued: Enqueued, seconds: float) -> StepDone:
        step, outcome = enqueued.step, self.stepper.outcome(enqueued)
        row = {"step": step, "epoch": self._plan.epoch(step), **asdict(outcome)}
        self._metrics.write(row)
        self._timing.write({"step": step, "tokens": outcome.tokens, "seconds": seconds})
        return StepDone(**row, seconds=seconds)

    def _examine(self, step: int) -> Examined:
        findings = examine_gradients(self._trainable, self.stepper.without_gradient())
        check(findings)
        return Examined(step, tuple(findings))

    def _validate(self, step: int) -> Validated:
        began = time.perf_counter()
        predictions = predict_with(
            self._objective,
            self._validation_rows,
            batch_size=self._training.evaluation_batch_size,
        )
        nll = mean_nll(predictions)
        if not math.isfinite(nll):
            raise TrainingError(
                f"step {step}: the mean nll of the validation rows is {nll}",
                "lower training.learning_rate, or set model.dtype to 'float32'.",
            )
        right = None if callable(self._trainable.task) else accuracy(predictions)
        best = all(nll < earlier["nll"] for earlier in self.progress.validations)
        row = {"step": step, "nll": nll, "accuracy": right, "best": best}
        if best:
            self.progress.best_step = step
            self._best = _copies(self._optimiser.trained())
        self.progress.validations.append(row)
        self._metrics.write({"step": step, **{f"validation_{k}": row[k] for k in _SHOWN}})
        seconds = time.perf_counter() - began
        self._timing.write({"step": step, "validation_seconds": seconds})
        return Validated(**row, seconds=seconds)

    def _is_patience_spent(self) -> bool:
        patience = self._training.patience
        if patience is None:
            return False
        recent = self.progress.validations[-patience:]
        return len(recent) == patience and not any(row["best"] for row in recent)

    def _save(self) -> CheckpointSaved:
        began = time.perf_counter()
        state: dict[str, Tensor] = {}
        if not self.progress.finished:
            trained = self._optimiser.trained()
            state = {f"trained/{name}": value for name, value in trained.items()}
            state |= self._optimiser.state()
        self._saved_step = self.progress.step
        path = self._checkpoints.save(
            Checkpoint(
                progress=self.progress,
                identity=self._identity,
                metrics=self._metrics.mark(),
                timing=self._timing.mark(),
                state=state,
                best=self._best,
            )
        )
        return CheckpointSaved(self.progress.step, path, time.perf_counter() - began)

    def interrupted(self) -> Interrupted:
        """What ends a run whose state is safe."""
        return Interrupted(
            f"stopped after step {self.progress.step} of {self._plan.total_steps}; the state is "
            f"safe in {self._checkpoints.folder}",
            "start the run again with --resume.",
        )

    def _restore(self, state: dict[str, Tensor]) -> None:
        prefix = "trained/"
        self._optimiser.set_trained(
            {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        )
        self._optimiser.set_state(state)

    def _remaining_batches(self) -> Iterator[list[int]]:
        epoch, done = divmod(self.progress.step, self._plan.steps_per_epoch)
        while True:
            epoch += 1
            yield from self._plan.batches(epoch)[done:]
            done = 0


_SHOWN = ("nll", "accuracy", "best")


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, whatever the device."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
