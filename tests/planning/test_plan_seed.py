"""The seed's own runs, planned from their settings alone, against what was measured there."""

import time

import pytest
from plan_settings import seed_run, settings

from loralab.planning import Planner, find_device

GIB = 2**30
A10 = find_device("a10")


def peak(step: str = "peft", **changes: object) -> float:
    return Planner(A10, step).plan(seed_run(**changes), quick=True).peak_bytes / GIB


def test_the_lora_run_took_what_the_plan_says():
    assert peak() == pytest.approx(20.5715, rel=0.01)


def test_full_fine_tuning_at_batch_two_fails_by_foreach_alone():
    full = {"method__kind": "full", "training__batch_size": 2}
    assert peak(**full, training__fused=False) > 22.07
    assert peak(**full) == pytest.approx(18.4, abs=0.1)


def test_the_frozen_baseline_needs_less_than_lora():
    frozen = {
        "method__kind": "frozen",
        "method__frozen_layers": 12,
        "method__freeze_embedding": False,
    }
    assert peak(**frozen) == pytest.approx(18.8, abs=0.1)


@pytest.mark.slow
def test_dropout_keeps_three_gibibytes_in_peft_and_next_to_nothing_here():
    assert peak() - peak(method__dropout=0.0) == pytest.approx(3.35, abs=0.1)
    assert peak("own") - peak("own", method__dropout=0.0) < 0.2


def test_a_plan_says_when_and_for_what():
    plan = Planner(A10, "peft").plan(seed_run(), quick=True)
    assert plan.phase == "forward, last block"
    assert sum(plan.parts.values()) == plan.peak_bytes
    assert list(plan.parts.values()) == sorted(plan.parts.values(), reverse=True)
    assert plan.parts["weights"] == pytest.approx(1_235_818_498 * 4, rel=1e-4)
    assert plan.parts["cuBLAS workspaces"] == 2 * (8 * 2**20 + 128 * 2**10)
    assert plan.fits


def test_gpt_3_is_planned_in_seconds():
    config = settings(
        "gpt-3-175b",
        model__task="causal",
        model__dtype="bfloat16",
        data__max_tokens=2048,
        training__batch_size=1,
    )
    began = time.process_time()
    plan = Planner(find_device("h200")).plan(config)
    assert time.process_time() - began < 30
    assert plan.parts["weights"] == pytest.approx(174.6e9 * 2, rel=0.01)
    assert not plan.fits
