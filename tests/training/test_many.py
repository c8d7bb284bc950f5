"""Runs trained in one pass: each is what it would be alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import bert, causal_rows, labelled_rows, llama, ready, run, training
from transformers import GPT2Config, PreTrainedModel

from loralab.config import MethodSection
from loralab.models import build_model
from loralab.training import Failed, Stopped, StepDone, Trainable, Validated, fit_many, prepare_many
from loralab.training import many as many_module

METHODS: list[dict[str, Any]] = [
    {"rank": 2, "alpha": 4.0},
    {"rank": 8, "alpha": 16.0, "dropout": 0.3, "scaling": "alpha/sqrt(rank)"},
    {"rank": 4, "dropout": 0.1, "targets": r".*(q_proj|down_proj|query|intermediate.dense|c_fc)"},
]
CHANGES: list[dict[str, Any]] = [
    {"seed": 1, "learning_rate": 3e-2},
    {"seed": 2, "batch_size": 3, "schedule": "constant"},
    {"seed": 3, "batch_size": 2, "accumulation": 2, "max_grad_norm": 0.1},
]


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
        "bert-mean": lambda: (bert(pooling="mean"), "classification"),
        "gpt2": lambda: (gpt2("causal"), "causal"),
        "llama-bf16": lambda: (llama("classification", dtype="bfloat16"), "classification"),
    }
    return made[kind]()


def together(kind: str, methods=METHODS, changes=CHANGES) -> tuple[list[Trainable], str]:
    model, task = model_of(kind)
    sections = [MethodSection.model_validate({"rank": 4, "alpha": 8.0} | m) for m in methods]
    settings = [
        (method, training(**({"epochs": 2} | c)))
        for method, c in zip(sections, changes, strict=True)
    ]
    return prepare_many(model, settings, task=task), task


def rows_of(task: str, count: int, seed: int = 0):
    return labelled_rows(count, seed) if task == "classification" else causal_rows(count, seed)


def run_many(trainables: list[Trainable], task: str, folder: Path, **changes: Any):
    folders = [folder / str(number) for number in range(len(trainables))]
    rows, held_out = rows_of(task, 22), rows_of(task, 8, seed=1)
    return list(fit_many(trainables, rows, held_out, folders, **changes))


@pytest.mark.parametrize(
    "kind", ["llama", "llama-causal", "llama-unfused", "bert", "bert-mean", "gpt2"]
)
def test_each_run_is_what_it_is_alone(kind: str, tmp_path: Path) -> None:
    trainables, task = together(kind)
    events = run_many(trainables, task, tmp_path / "many")
    rows, held_out = rows_of(task, 22), rows_of(task, 8, seed=1)
    for number, (method, change) in enumerate(zip(METHODS, CHANGES, strict=True)):
        model, _ = model_of(kind)
        alone = ready(model=model, task=task, method=method, **({"epochs": 2} | change))
        wanted = run(alone, rows, held_out, tmp_path / f"alone-{number}")
        got = [event for index, event in events if index == number]
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


@pytest.mark.parametrize("kind", ["llama", "llama-causal", "bert", "bert-mean", "gpt2"])
def test_their_blocks_are_run_at_once(kind: str) -> None:
    trainables, _ = together(kind)
    assert many_module._together(trainables) is not None
