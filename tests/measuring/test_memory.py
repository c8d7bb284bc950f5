"""The meters against sums done by hand."""

import gc
import time

import pytest
import torch
from torch import nn

from loralab.measuring import live_bytes, median_step_seconds, peak_live_bytes, watch_peak

MILLION = 1_000_000
TOLERANCE = 64 * 1024  # scalars and the profiler's own tensors


@pytest.fixture(autouse=True)
def nothing_waits_to_be_freed() -> None:
    """What other tests left in cycles would be freed in the middle of a measurement."""
    gc.collect()


def test_peak_is_what_lives_at_the_start_plus_the_highest_sum_of_allocations() -> None:
    def step() -> None:
        first = torch.zeros(MILLION)  # 4 MB
        second = first + 1  # 8 MB
        del first
        third = second * second  # 8 MB
        del second, third

    before = live_bytes()
    assert peak_live_bytes(step) - before == pytest.approx(8 * MILLION, abs=TOLERANCE)


def test_weights_gradients_and_adams_moments_count() -> None:
    before = live_bytes()
    weight = nn.Parameter(torch.ones(MILLION))
    slope = torch.ones(MILLION)
    adamw = torch.optim.AdamW([weight], fused=True)

    def step() -> None:
        (weight * slope).sum().backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    # weight, slope, two moments, and in the step the product and later the gradient
    assert peak_live_bytes(step) - before == pytest.approx(5 * 4 * MILLION, abs=TOLERANCE)
    assert live_bytes() - before == pytest.approx(4 * 4 * MILLION, abs=TOLERANCE)


def test_a_frozen_weight_costs_no_gradient_and_no_moments() -> None:
    before = live_bytes()
    layer = nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    small = nn.Parameter(torch.ones(1000))
    adamw = torch.optim.AdamW([small], fused=True)
    x = torch.ones(1, 1000)

    def step() -> None:
        layer(x * small).sum().backward()
        adamw.step()
        adamw.zero_grad()

    assert peak_live_bytes(step) - before == pytest.approx(4 * MILLION, abs=TOLERANCE)


def test_views_and_shared_storages_count_once() -> None:
    before = live_bytes()
    whole = torch.zeros(MILLION)
    parts = whole.split(10)
    tied = nn.Parameter(whole)
    assert live_bytes() - before == 4 * MILLION
    del parts, tied


def test_a_gradient_that_is_left_over_counts() -> None:
    weight = nn.Parameter(torch.ones(MILLION))
    before = live_bytes()
    (weight * 2).sum().backward()
    assert live_bytes() - before == 4 * MILLION


def test_what_nobody_can_reach_is_not_counted() -> None:
    gc.collect()
    gc.disable()
    try:
        before = live_bytes()
        model = nn.Linear(1000, 1000)
        vars(model)["itself"] = model  # a circle that the collector alone can free
        del model
        assert live_bytes() >= before + 4_000_000
        with watch_peak(torch.device("cpu")) as watched:
            torch.ones(1000)
    finally:
        gc.enable()
    assert watched.peak_bytes == pytest.approx(before + 4000, abs=1000)


def test_the_median_ignores_the_slow_few_and_the_warmup() -> None:
    naps = iter([0.2, 0.2, 0.01, 0.2, 0.01, 0.01, 0.2])
    seconds = median_step_seconds(lambda: time.sleep(next(naps)), warmup=2, repeats=5)
    assert 0.01 <= seconds < 0.1
