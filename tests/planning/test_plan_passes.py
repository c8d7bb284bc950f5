"""Plans of many trainings in one pass, against the allocator's accounting of real ones."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from plan_settings import settings

from loralab.adapters import noise
from loralab.config import RunConfig
from loralab.measuring import live_bytes, peak_live_bytes
from loralab.planning import Planner, find_device, most_runs, pass_levers, plan_pass
from loralab.planning.sources import drawn_model
from loralab.planning.steps import rows_for
from loralab.training import prepare_many, repeatable_pass

CPU = find_device("cpu")
RUNS: list[dict[str, Any]] = [
    {"method__rank": 4, "training__seed": 1},
    {"method__rank": 16, "method__dropout": 0.0, "training__batch_size": 5},
    {"method__rank": 8, "training__batch_size": 2, "training__accumulation": 2},
]


BLOCKS = {name: {"num_hidden_layers": 2} for name in ("llama", "bert")} | {"gpt2": {"n_layer": 2}}


def configs_of(path: str, **changes: Any) -> list[RunConfig]:
    return [settings(path, **(own | changes)) for own in RUNS]


def measured(configs: list[RunConfig]) -> int:
    noise._table.cache_clear()
    gc.collect()
    before = live_bytes()
    model = drawn_model(configs[0], torch.device("cpu"))
    pairs = [(config.method, config.training) for config in configs]
    trainables = prepare_many(model, pairs, task=configs[0].model.text_task)
    step = repeatable_pass(trainables, [rows_for(config) for config in configs])
    return peak_live_bytes(step) - before


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"model__task": "causal"}),
        ("bert", {"method__dropout": 0.0}),
        ("gpt2", {"model__task": "causal", "model__dtype": "bfloat16"}),
        ("bert", {"method__dropout": 0.0, "training__activation_checkpointing": True}),  # in turns
    ],
)
def test_what_a_real_pass_takes(config_file, family, changes) -> None:
    configs = configs_of(config_file(family, **BLOCKS[family]), **changes)
    plan = plan_pass(configs, CPU)
    assert plan.num_runs == 3 and not plan.estimated
    assert plan.peak_bytes == pytest.approx(measured(configs), rel=0.01, abs=64 * 1024)
    assert sum(plan.parts.values()) == plan.peak_bytes


def test_few_blocks_tell_of_many(config_file) -> None:
    configs = configs_of(config_file("llama", num_hidden_layers=8))[:2]
    assert plan_pass(configs, CPU).peak_bytes == pytest.approx(measured(configs), rel=0.01)


def test_a_pass_shares_the_base_and_adds_up_the_activations(config_file) -> None:
    config = settings(config_file("llama"))
    alone, pair = Planner(CPU).plan(config), plan_pass([config, config], CPU)
    held = {kind: size for kind, size in pair.parts.items() if kind.startswith("activations")}
    own = {kind: size for kind, size in alone.parts.items() if kind.startswith("activations")}
    assert pair.parts["weights"] == alone.parts["weights"]
    assert pair.parts["adapters"] == 2 * alone.parts["adapters"]
    assert sum(held.values()) == pytest.approx(2 * sum(own.values()), rel=0.05)


def test_how_many_fit_and_what_would_help(config_file) -> None:
    config = settings(config_file("llama", num_hidden_layers=1), data__max_tokens=200)
    configs = [config] * 2
    rows = [rows_for(config)] * 2
    one, two = (plan_pass(configs[:count], CPU).needed_bytes for count in (1, 2))
    room = replace(CPU, capacity_bytes=(one + two) // 2)
    assert most_runs(configs, room, rows) == 1
    plan = plan_pass(configs, room, rows)
    assert not plan.fits
    found = {lever.settings: lever for lever in pass_levers(configs, plan, rows)}
    assert set(found) == {
        ("training.activation_checkpointing=true",),
        ("training.batch_size=1", "training.accumulation=3"),
        ('model.dtype="bfloat16"',),
    }
    assert all(lever.cost for lever in found.values())
    changed = [c.replace(training__batch_size=1, training__accumulation=3) for c in configs]
    saved = plan.peak_bytes - plan_pass(changed, room, rows).peak_bytes
    assert found["training.batch_size=1", "training.accumulation=3"].saves_bytes == saved > 0


def test_a_pass_has_the_levers_of_all_its_runs(config_file) -> None:
    """The batches of two runs are not halved alike, and neither is in fp32."""
    path = config_file("llama", num_hidden_layers=2)
    config = settings(path, model__dtype="bfloat16", data__max_tokens=200)
    configs = [config, config.replace(training__batch_size=4)]
    found = pass_levers(configs, plan_pass(configs, CPU), [rows_for(each) for each in configs])
    assert [lever.name for lever in found] == ["activation checkpointing"]


def test_a_pass_for_a_gpu_is_planned_without_one(config_file) -> None:
    path = config_file("llama", **BLOCKS["llama"])
    configs = configs_of(path, model__dtype="bfloat16", model__task="causal")
    plan = plan_pass(configs, find_device("h100"))
    assert plan.fits and not plan.estimated
    assert plan.peak_bytes > plan_pass(configs[:1], find_device("h100")).peak_bytes
