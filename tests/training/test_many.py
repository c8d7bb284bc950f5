"""Runs trained in one pass: each is what it would be alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bert, causal_rows, labelled_rows, llama, ready, run, training
from transformers import GPT2Config, PreTrainedModel

from loralab.config import MethodSection
from loralab.models import build_model
from loralab.training import (
    CheckpointSaved,
    Failed,
    Finished,
    StepDone,
    Stopped,
    Trainable,
    Validated,
    fit_many,
    prepare_many,
)
from loralab.training.shared_step import joint_of

METHODS: list[dict[str, Any]] = [
    {"rank": 2, "alpha": 4.0},
    {"rank": 8, "alpha": 16.0, "dropout": 0.3, "scaling": "alpha/sqrt(rank)"},
    {"rank": 4, "dropout": 0.1, "targets": r".*(q_proj|down_proj|query|intermediate.dense|c_fc)"},
]
CHANGES: list[dict[str, Any]] = [
    {"seed": 1, "learning_rate": 3e-3},
    {"seed": 2, "batch_size": 3, "schedule": "constant", "epochs": 1},
    {"seed": 3, "batch_size": 2, "accumulation": 2, "max_grad_norm": 0.1},
]


BASE: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3}


def gpt2(task: str) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=97, n_embd=24, n_layer=2, n_head=2, n_positions=64, pad_token_id=0
    )
    return build_model(config, task=task, device="cpu", seed=1)


def model_of(kind: str) -> tuple[PreTrainedModel, str]:
    made = {
        "llama": lambda: (llama("classification"), "classification"),
        "llama-causal": lambda: (llama("causal"), "causal"),
        "llama-unfused": lambda: (llama("causal", dropout=0.1), "causal"),
        "bert": lambda: (bert(), "classification"),
        "gpt2": lambda: (gpt2("causal"), "causal"),
    }
    return made[kind]()


def together(kind: str, methods=METHODS, changes=CHANGES) -> tuple[list[Trainable], str]:
    model, task = model_of(kind)
    sections = [MethodSection.model_validate({"rank": 4, "alpha": 8.0} | m) for m in methods]
    settings = [
        (method, training(**(BASE | c))) for method, c in zip(sections, changes, strict=True)
    ]
    return prepare_many(model, settings, task=task), task


def rows_of(task: str, count: int, seed: int = 0):
    return labelled_rows(count, seed) if task == "classification" else causal_rows(count, seed)


def run_many(trainables: list[Trainable], task: str, folder: Path, **changes: Any):
    return list(iter_many(trainables, task, folder, **changes))


@pytest.mark.parametrize("kind", ["llama", "llama-causal", "llama-unfused", "bert", "gpt2"])
def test_each_run_is_what_it_is_alone(kind: str, tmp_path: Path) -> None:
    trainables, task = together(kind)
    assert joint_of(trainables) is not None
    events = run_many(trainables, task, tmp_path / "many")
    rows, held_out = rows_of(task, 22), rows_of(task, 8, seed=1)
    for number, (method, change) in enumerate(zip(METHODS, CHANGES, strict=True)):
        model, _ = model_of(kind)
        alone = ready(model=model, task=task, method=method, **(BASE | change))
        wanted = _unsaved(run(alone, rows, held_out, tmp_path / f"alone-{number}"))
        got = _unsaved(event for index, event in events if index == number)
        assert [type(event) for event in got] == [type(event) for event in wanted]
        for one, other in zip(got, wanted, strict=True):
            if isinstance(other, StepDone):
                assert (one.step, one.rows, one.tokens) == (other.step, other.rows, other.tokens)
                assert one.loss == pytest.approx(other.loss, rel=1e-4)
                assert one.learning_rates == other.learning_rates
            if isinstance(other, Validated):
                assert one.nll == pytest.approx(other.nll, rel=1e-4)
        for name, parameter in alone.parameters.items():
            torch.testing.assert_close(
                trainables[number].parameters[name], parameter, rtol=1e-3, atol=1e-4
            )


def _unsaved(events: Iterable[Any]) -> list[Any]:
    """Without checkpoints, which are saved more often where others end."""
    return [event for event in events if not isinstance(event, CheckpointSaved)]


@pytest.mark.parametrize(("number", "step"), [(0, 4), (1, 6), (2, 8)])
def test_a_pass_that_is_killed_goes_on_bit_for_bit(number: int, step: int, tmp_path: Path) -> None:
    """Killed when one run has saved that step and the next has not; the runs end one by one."""
    changes = [change | {"checkpoint_steps": 4} for change in CHANGES]
    whole, task = together("llama", changes=changes)
    lengths = {n: e.step for n, e in run_many(whole, task, tmp_path / "whole") if _is_end(e)}
    assert len(set(lengths.values())) > 1
    cut, _ = together("llama", changes=changes)
    events = iter_many(cut, task, tmp_path / "cut")
    for at, event in events:
        if at == number and isinstance(event, CheckpointSaved) and event.step >= step:
            break
    events.close()
    again, _ = together("llama", changes=changes)
    run_many(again, task, tmp_path / "cut")
    for one, other in zip(whole, again, strict=True):
        for name, parameter in one.parameters.items():
            assert torch.equal(parameter, other.parameters[name])


def _is_end(event: Any) -> bool:
    return isinstance(event, Finished)


def test_what_cannot_be_run_at_once_takes_turns(tmp_path: Path) -> None:
    methods = [{"dora": True, "dropout": 0.2}, {"rank": 2}]
    trainables, task = together("llama", methods, CHANGES[:2])
    assert joint_of(trainables) is None
    events = run_many(trainables, task, tmp_path / "many")
    alone = ready(method=methods[0], **(BASE | CHANGES[0]))
    wanted = run(alone, rows_of(task, 22), rows_of(task, 8, seed=1), tmp_path / "alone")
    losses = [event.loss for n, event in events if n == 0 and isinstance(event, StepDone)]
    assert losses == [event.loss for event in wanted if isinstance(event, StepDone)]


def test_a_run_continues_what_it_began_among_others(tmp_path: Path) -> None:
    trainables, task = together("llama")
    for _, event in zip(range(30), iter_many(trainables, task, tmp_path), strict=False):
        last = event
    assert last is not None
    alone = ready(method=METHODS[1], **(BASE | CHANGES[1]))
    events = run(alone, rows_of(task, 22), rows_of(task, 8, seed=1), tmp_path / "1")
    assert events[0].step >= 3
    trainables, _ = together("llama")
    again = run_many(trainables, task, tmp_path)
    assert {n for n, event in again if isinstance(event, Finished)} == {0, 1, 2}


def iter_many(trainables: list[Trainable], task: str, folder: Path, **changes: Any):
    count = len(trainables)
    folders = [folder / str(number) for number in range(count)]
    rows, held_out = [rows_of(task, 22)] * count, [rows_of(task, 8, seed=1)] * count
    return fit_many(trainables, rows, held_out, folders, **changes)


def test_one_that_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    changes = [{"learning_rate": 1e-3}, {"learning_rate": 1e30, "warmup": 0.0}]
    trainables, task = together("llama", METHODS[:1] * 2, changes)
    events = run_many(trainables, task, tmp_path)
    assert [n for n, event in events if isinstance(event, Failed)] == [1]
    assert [n for n, event in events if isinstance(event, Finished)] == [0]


def test_successive_halving_stops_the_worse_half(tmp_path: Path) -> None:
    rates = [1e-6, 1e-3, 1e-2, 1e-7]
    changes = [{"learning_rate": rate, "evaluations_per_epoch": 3} for rate in rates]
    trainables, task = together("llama", METHODS[:1] * 4, changes)
    events = run_many(trainables, task, tmp_path, halving=True)
    stopped = [n for n, event in events if isinstance(event, Stopped)]
    assert len(stopped) == 3
    ends = {n: event for n, event in events if isinstance(event, Finished)}
    assert sorted(ends) == [0, 1, 2, 3]
    assert sorted(n for n, end in ends.items() if end.stopped_early) == sorted(stopped)
    (left,) = set(ends) - set(stopped)
    assert ends[left].best_nll == min(end.best_nll for end in ends.values())


@pytest.mark.parametrize("save", [2, 5, 9])
def test_halving_that_is_killed_comes_to_the_same_end(save: int, tmp_path: Path) -> None:
    rates = [1e-6, 1e-3, 1e-2, 1e-7]
    changes = [
        {"learning_rate": rate, "evaluations_per_epoch": 3, "checkpoint_steps": 2} for rate in rates
    ]

    def contest(folder: Path):
        trainables, task = together("llama", METHODS[:1] * 4, changes)
        return trainables, iter_many(trainables, task, folder, halving=True)

    whole, events = contest(tmp_path / "whole")
    ends = {n: event.step for n, event in events if isinstance(event, Finished)}
    _, events = contest(tmp_path / "cut")
    saves = (event for _, event in events if isinstance(event, CheckpointSaved))
    for _ in range(save):
        next(saves)
    events.close()
    again, events = contest(tmp_path / "cut")
    assert {n: event.step for n, event in events if isinstance(event, Finished)} == ends
    for one, other in zip(whole, again, strict=True):
        for name, parameter in one.parameters.items():
            assert torch.equal(parameter, other.parameters[name])
