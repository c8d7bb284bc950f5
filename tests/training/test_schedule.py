"""Schedules against their formulas."""

import math

import pytest
from hypothesis import given, strategies as st
from tiny import training

from loralab.training import Schedule, build_schedule, stream_seed


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(1, schedule.total_steps + 1)]


def test_constant_is_one_after_a_linear_warmup() -> None:
    assert factors(Schedule("constant", 6, 4)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_by_equal_amounts_and_ends_one_amount_above_zero() -> None:
    assert factors(Schedule("linear", 5, 0)) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert factors(Schedule("linear", 6, 2)) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_a_period() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert factors(Schedule("cosine", 8, 0)) == pytest.approx(expected)


@given(
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    total=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
)
def test_no_step_is_wasted_and_none_exceeds_the_rate(shape: str, total: int, warmup: float) -> None:
    schedule = build_schedule(training(schedule=shape, warmup=warmup), total)
    found = factors(schedule)
    assert all(0 < factor <= 1 for factor in found)
    rise, fall = found[: schedule.warmup_steps], found[schedule.warmup_steps :]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)


def test_streams_share_nothing() -> None:
    seeds = [
        stream_seed(seed, purpose, step)
        for seed in range(3)
        for purpose in ("data", "initialisation", "dropout")
        for step in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
