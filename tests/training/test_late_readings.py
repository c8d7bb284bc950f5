"""What is read late, since the device lags behind, is what would be read at once."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import labelled_rows, llama, of_kind, ready, run, training
from torch import Tensor

from loralab.config import MethodSection
from loralab.data import Encoded
from loralab.errors import Interrupted, TrainingError
from loralab.training import (
    CheckpointSaved,
    Event,
    Failed,
    StepDone,
    Trainable,
    fit,
    fit_many,
    loop,
    prepare_many,
)
from loralab.training.forward import objective_of
from loralab.training.loop import Fit
from loralab.training.optimiser import Optimiser
from loralab.training.readings import Reading
from loralab.training.step import Enqueued, Stepper

ROWS, VALIDATION = labelled_rows(20), labelled_rows(8, seed=1)
RARE = 1
"""A token that `with_fault` makes fatal, in no row but those of `marked`."""


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No reading has arrived unless it is waited for; the list tells what happened in turn."""
    told: list[str] = []
    enqueue, outcome = Fit.enqueue, Stepper.outcome

    def noting_enqueue(own: Fit, *args: Any) -> Enqueued:
        told.append(f"enqueue {own.next_step}")
        return enqueue(own, *args)

    def noting_outcome(own: Stepper, enqueued: Enqueued) -> Any:
        told.append(f"read {enqueued.step}")
        return outcome(own, enqueued)

    monkeypatch.setattr(Reading, "has_arrived", property(lambda _: False))
    monkeypatch.setattr(Fit, "enqueue", noting_enqueue)
    monkeypatch.setattr(Stepper, "outcome", noting_outcome)
    return told


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still, so that all files have the same bytes."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def trainable() -> Trainable:
    return ready(
        "lora",
        epochs=30,
        method={"dropout": 0.1},
        learning_rate=3e-2,
        schedule="constant",
        patience=1,
        checkpoint_steps=4,
    )


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def nameless(events: Sequence[Event]) -> list[Event]:
    """The events without the run's own folder."""
    return [replace(e, path=Path()) if isinstance(e, CheckpointSaved) else e for e in events]


@pytest.mark.usefixtures("still")
def test_late_readings_change_neither_files_nor_events(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Through examination, validations, checkpoints and the end of patience."""
    at_once = run(trainable(), ROWS, VALIDATION, tmp_path / "at once")
    told = request.getfixturevalue("late")
    later = run(trainable(), ROWS, VALIDATION, tmp_path / "late")
    assert nameless(later) == nameless(at_once)
    assert files(tmp_path / "late") == files(tmp_path / "at once")
    assert told[:6] == ["enqueue 1", "enqueue 2", "read 1", "read 2", "enqueue 3", "enqueue 4"]
    assert told.index("enqueue 7") < told.index("read 6")


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("step", [3, 6])
def test_a_late_run_that_is_killed_goes_on_with_the_same_bytes(
    step: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run(trainable(), ROWS, VALIDATION, tmp_path / "at once")
    request.getfixturevalue("late")
    events: Any = fit(trainable(), ROWS, VALIDATION, tmp_path / "late")
    next(e for e in events if isinstance(e, StepDone) and e.step == step)
    events.close()
    run(trainable(), ROWS, VALIDATION, tmp_path / "late")
    assert files(tmp_path / "late") == files(tmp_path / "at once")


def test_a_late_run_reads_what_is_under_way_before_it_stops(tmp_path: Path, late, monkeypatch):
    """Step 7 is enqueued when Ctrl-C comes with step 6: it is told and kept too."""
    told = []
    with pytest.raises(Interrupted, match="stopped after step 7 of"):
        for event in fit(trainable(), ROWS, VALIDATION, tmp_path):
            told.append(event)
            if isinstance(event, StepDone) and event.step == 6:
                os.kill(os.getpid(), signal.SIGINT)
    assert [type(event) for event in told[-2:]] == [StepDone, CheckpointSaved]
    assert told[-1].step == 7


def test_seconds_are_the_devices_and_not_those_of_enqueueing(tmp_path: Path, monkeypatch) -> None:
    """A step keeps this device busy for a second, and its host for a tenth."""
    now = ends = 0.0
    enqueue = Fit.enqueue

    def enqueueing(own: Fit, *args: Any) -> Enqueued:
        nonlocal now, ends
        now += 0.1
        ends = max(ends, now) + 1.0
        return enqueue(own, *args)

    def wait(own: Reading) -> None:
        nonlocal now
        now = max(now, vars(own)["ends"])

    start = Reading.__init__

    def starting(own: Reading, numbers: Tensor) -> None:
        start(own, numbers)
        vars(own)["ends"] = ends

    monkeypatch.setattr(Fit, "enqueue", enqueueing)
    monkeypatch.setattr(Reading, "__init__", starting)
    monkeypatch.setattr(Reading, "wait", wait)
    monkeypatch.setattr(Reading, "has_arrived", property(lambda own: vars(own)["ends"] <= now))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    events = run(ready("lora", checkpoint_steps=100), ROWS, [], tmp_path)
    seconds = [event.seconds for event in of_kind(events, StepDone)]
    assert sum(seconds) == pytest.approx(now)
    assert seconds[3:-1] == pytest.approx([1.0] * (len(seconds) - 4))


# a number that is none --------------------------------------------------------------------------


def marked(rows: Sequence[Encoded]) -> list[Encoded]:
    """The first row ends in the rare token."""
    first = rows[0]
    return [replace(first, input_ids=(*first.input_ids[:-1], RARE)), *rows[1:]]


def with_fault(trainable: Trainable, where: str) -> Trainable:
    """Output or gradient of the embedding is infinite for the rare token."""

    def spoil(_module: Any, args: Any, output: Tensor) -> Tensor | None:
        is_rare = (args[0] == RARE)[..., None]
        if where == "output":
            return output.masked_fill(is_rare, torch.inf)
        if output.requires_grad:
            output.register_hook(lambda g: g.masked_fill(is_rare, torch.inf))
        return None

    embedding: Any = trainable.model.get_submodule("model.embed_tokens")
    embedding.register_forward_hook(spoil)
    return trainable


CULPRITS = {
    "output": r"step \d+: the loss or a gradient is not a number; "
    r"it came from the output of model.embed_tokens \(Embedding\)",
    "gradient": r"step \d+: the loss or a gradient is not a number; "
    r"it came from the gradient of model.embed_tokens.weight",
}


@pytest.mark.parametrize("where", CULPRITS)
def test_a_late_run_names_the_same_culprit(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rows = [*labelled_rows(28), *marked(labelled_rows(4, seed=2))]
    messages = []
    for name in ("at once", "late"):
        if name == "late":
            request.getfixturevalue("late")
        faulty = with_fault(ready("full", checkpoint_steps=100, seed=2), where)
        with pytest.raises(TrainingError, match=CULPRITS[where]) as caught:
            run(faulty, rows, [], tmp_path / name)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("at once", "late")]
    assert metrics[0] == metrics[1]
    assert metrics[0].count(b"\n") >= 3  # steps without the fault


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_moves_from_a_bad_step_on(fused: bool, dtype: str) -> None:
    model = llama(dtype=dtype)
    faulty = with_fault(ready("full", model=model, fused=fused), "gradient")
    optimiser = Optimiser(faulty.groups, faulty.training)
    stepper = Stepper(faulty, optimiser, objective_of(faulty))
    good, bad = labelled_rows(4), marked(labelled_rows(4))

    def enqueue(step: int, rows: Sequence[Encoded]) -> Enqueued:
        return stepper.conclude(step, rows, stepper.gradients(step, rows), 1.0)

    def state() -> dict[str, Tensor]:
        found = {**optimiser.trained(), **optimiser.state(), **dict(model.named_parameters())}
        return {name: value.detach().clone() for name, value in found.items()}

    stepper.outcome(enqueue(1, good))
    before = state()
    enqueued = enqueue(2, bad), enqueue(3, good)
    after = state()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(TrainingError, match=CULPRITS["gradient"]):
        stepper.outcome(enqueued[0])
    optimiser.close()


# several runs in one pass -----------------------------------------------------------------------


def test_a_pass_is_enqueued_whole_before_it_is_read(tmp_path: Path, late: list[str]) -> None:
    sections = [MethodSection(rank=rank, alpha=8.0) for rank in (2, 4)]
    settings = [(section, training(max_steps=2)) for section in sections]
    runs = prepare_many(llama(), settings, task="classification")
    folders = [tmp_path / str(number) for number in range(2)]
    events: Iterator[Any] = fit_many(runs, [ROWS] * 2, [[]] * 2, folders)
    assert not [event for _, event in events if isinstance(event, Failed)]
    assert late == [
        f"{what} {step}" for step in (1, 2) for what in ("enqueue", "read") for _ in runs
    ]
