"""A run as a whole: it learns, validates, stops early, resumes, and fails with one clear error."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import causal_rows, labelled_rows, of_kind, ready, run

from loralab.errors import DataError, Interrupted, OutputError, ResumeError, TrainingError
from loralab.training import (
    CheckpointSaved,
    Examined,
    Finished,
    StepDone,
    Trainable,
    Validated,
    fit,
    mean_nll,
    predict,
)

ROWS, VALIDATION = labelled_rows(40), labelled_rows(16, seed=1)


def weights(trainable: Trainable) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable.parameters.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def run_until(trainable: Trainable, folder: Path, last_step: int) -> None:
    """A run that is left where a killed one would leave it."""
    events = fit(trainable, ROWS, VALIDATION, folder)
    for event in events:
        if isinstance(event, StepDone) and event.step == last_step:
            events.close()  # pyright: ignore[reportAttributeAccessIssue]
            return


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_training_lowers_the_validation_loss(task: str, tmp_path: Path) -> None:
    causal = task == "causal"
    rows, validation = (causal_rows(40), causal_rows(8, 1)) if causal else (ROWS, VALIDATION)
    trainable = ready("full", task=task, epochs=4, learning_rate=3e-3, evaluations_per_epoch=2)
    found = list(of_kind(run(trainable, rows, validation, tmp_path), Validated))
    assert len(found) == 8
    assert min(e.nll for e in found) < found[0].nll
    assert max(e.accuracy for e in found) > found[0].accuracy


def test_the_journal_says_what_the_events_said(tmp_path: Path) -> None:
    events = run(ready("lora", epochs=2), ROWS, VALIDATION, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["loss"] for row in steps] == [e.loss for e in of_kind(events, StepDone)]
    assert [row["validation_nll"] for row in rows if "validation_nll" in row] == [
        e.nll for e in of_kind(events, Validated)
    ]
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert len([row for row in timing if "tokens" in row]) == len(steps)
    assert not any("seconds" in key for row in rows for key in row)


def test_the_best_weights_are_in_the_model_at_the_end(tmp_path: Path) -> None:
    trainable = ready("full", epochs=6, learning_rate=3e-2, schedule="constant")
    events = run(trainable, ROWS, VALIDATION, tmp_path)
    validations = list(of_kind(events, Validated))
    best = min(validations, key=lambda e: e.nll)
    finished = next(of_kind(events, Finished))
    assert best.nll < validations[-1].nll  # the case is one where it matters
    assert (finished.best_step, finished.best_nll) == (best.step, best.nll)
    again = predict(trainable.model, VALIDATION, task="classification")
    assert mean_nll(again) == best.nll


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    trainable = ready("full", epochs=30, learning_rate=3e-2, schedule="constant", patience=2)
    events = run(trainable, ROWS, VALIDATION, tmp_path)
    finished = next(of_kind(events, Finished))
    assert finished.stopped_early
    assert [e.best for e in of_kind(events, Validated)][-2:] == [False, False]
    assert finished.step == finished.best_step + 2 * 10


def test_without_validation_the_last_weights_count(tmp_path: Path) -> None:
    trainable = ready("lora", max_steps=4)
    finished = next(of_kind(run(trainable, ROWS, [], tmp_path), Finished))
    assert (finished.step, finished.best_step, finished.best_nll) == (4, 4, None)


@pytest.mark.parametrize("kind", ["lora", "full", "frozen", "head"])
def test_resumed_equals_uninterrupted_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Killed at steps 2 (before any checkpoint), 5 and 17; with dropout, in bf16 for `full`."""

    def fresh() -> Trainable:
        from tiny import llama

        model = llama(dropout=0.1, dtype="bfloat16" if kind == "full" else "float32")
        return ready(kind, model=model, epochs=2, method={"dropout": 0.1})

    whole = fresh()
    run(whole, ROWS, VALIDATION, tmp_path / "whole")
    for step in (2, 5, 17):
        run_until(fresh(), tmp_path / "parts", step)
    parts = fresh()
    events = run(parts, ROWS, VALIDATION, tmp_path / "parts")
    assert [e.step for e in of_kind(events, StepDone)] == [16, 17, 18, 19, 20]
    assert_same(weights(whole), weights(parts))
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert predict(whole.model, VALIDATION, task="classification", route=whole.route) == predict(
        parts.model, VALIDATION, task="classification", route=parts.route
    )


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = ready("lora")
    before = run(first, ROWS, VALIDATION, tmp_path)
    second = ready("lora")
    after = run(second, ROWS, VALIDATION, tmp_path)
    assert not list(of_kind(after, StepDone))
    assert next(of_kind(after, Finished)) == next(of_kind(before, Finished))
    assert_same(weights(first), weights(second))


def test_two_checkpoints_are_kept_and_a_damaged_one_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = ready("lora", epochs=2)
    run(whole, ROWS, VALIDATION, tmp_path / "whole")
    run_until(ready("lora", epochs=2), tmp_path / "parts", 14)
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000009", "step-00000012"]
    state = folder / "step-00000012" / "state.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[-3] ^= 1
    state.write_bytes(damaged)
    parts = ready("lora", epochs=2)
    events = run(parts, ROWS, VALIDATION, tmp_path / "parts")
    assert next(of_kind(events, StepDone)).step == 10
    assert "state.safetensors does not have the contents" in caplog.text
    assert_same(weights(whole), weights(parts))


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    run_until(ready("lora"), tmp_path, 4)
    next((tmp_path / "checkpoints").glob("*/checkpoint.json")).write_text("{")
    with pytest.raises(ResumeError, match="every checkpoint is damaged"):
        run(ready("lora"), ROWS, VALIDATION, tmp_path)


def test_a_resume_that_would_give_other_bits_is_refused_with_every_reason(tmp_path: Path) -> None:
    run_until(ready("lora"), tmp_path, 4)
    with pytest.raises(ResumeError) as caught:
        run(ready("lora", learning_rate=5e-3, threads=2), ROWS[1:], VALIDATION, tmp_path)
    message = str(caught.value)
    assert "training.learning_rate was 0.01, is 0.005" in message
    assert "environment.threads was 1, is 2" in message
    assert "data.train_rows" in message
    torch.set_num_threads(1)


def test_a_changed_journal_is_refused(tmp_path: Path) -> None:
    run_until(ready("lora"), tmp_path, 4)
    journal = tmp_path / "metrics.jsonl"
    journal.write_text(journal.read_text().replace("loss", "1oss"))
    with pytest.raises(ResumeError, match="is not the file that the checkpoint belongs to"):
        run(ready("lora"), ROWS, VALIDATION, tmp_path)


def test_ctrl_c_ends_after_a_whole_step_with_a_checkpoint(tmp_path: Path) -> None:
    whole = ready("lora")
    run(whole, ROWS, VALIDATION, tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def consume() -> None:
        for event in fit(ready("lora"), ROWS, VALIDATION, tmp_path / "parts"):
            seen.append(event)
            if isinstance(event, StepDone) and event.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after step 4 of 10") as caught:
        consume()
    assert caught.value.exit_code == 130
    assert isinstance(seen[-1], CheckpointSaved)
    assert signal.getsignal(signal.SIGINT) is before
    parts = ready("lora")
    events = run(parts, ROWS, VALIDATION, tmp_path / "parts")
    assert next(of_kind(events, StepDone)).step == 5
    assert_same(weights(whole), weights(parts))


def test_ctrl_c_during_the_last_step_is_not_forgotten(tmp_path: Path) -> None:
    def consume() -> None:
        for event in fit(ready("lora", max_steps=3), ROWS, VALIDATION, tmp_path):
            if isinstance(event, Validated):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after step 3 of 3"):
        consume()
    events = run(ready("lora", max_steps=3), ROWS, VALIDATION, tmp_path)
    assert not list(of_kind(events, StepDone))


def test_a_run_of_one_step_is_not_told_that_gradients_are_missing(tmp_path: Path) -> None:
    events = run(ready("lora", max_steps=1), ROWS, VALIDATION, tmp_path)
    assert not list(of_kind(events, Examined))


@contextmanager
def largest_file(num_bytes: int):
    """The operating system refuses to write beyond `num_bytes`, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    run_until(ready("full"), tmp_path, 4)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with largest_file(20_000), pytest.raises(OutputError, match="step-00000006"):
        run(ready("full"), ROWS, VALIDATION, tmp_path)
    assert (
        sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names == ["step-00000003"]
    )
    events = run(ready("full"), ROWS, VALIDATION, tmp_path)
    assert next(of_kind(events, StepDone)).step == 4


def test_a_journal_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        run(ready("lora"), ROWS, VALIDATION, tmp_path)


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row to train on"):
        run(ready("lora"), [], [], tmp_path)


def test_a_rate_that_explodes_is_an_error_that_names_the_origin(tmp_path: Path) -> None:
    trainable = ready("full", learning_rate=1e30, epochs=5, warmup=0.0)
    with pytest.raises(TrainingError, match=r"step \d+: .* came from"):
        run(trainable, ROWS, [], tmp_path)


def test_the_best_values_in_a_checkpoint_are_those_of_the_best_step(tmp_path: Path) -> None:
    run_until(ready("lora", epochs=2), tmp_path, 18)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    first, second = (folder / "best.safetensors" for folder in folders)
    assert first.stat().st_ino == second.stat().st_ino  # linked, not written again
    assert load_file(second).keys() == ready("lora").parameters.keys()
