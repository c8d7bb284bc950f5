"""The grid is extended until it brackets the best, and says when it could not."""

import math

import pytest

from loralab.runs.sweep import sweep


def bowl(best):
    return lambda rate: abs(math.log10(rate / best))


@pytest.mark.parametrize("best", [1e-5, 1e-4, 1e-3, 1e-2])
def test_the_best_is_found_and_bracketed(best):
    found = sweep([1e-4, 1e-3], bowl(best), max_extensions=4)
    assert found.bracketed
    assert found.best_rate == pytest.approx(best)
    assert min(found.losses) < found.best_rate < max(found.losses)


def test_an_edge_that_cannot_be_left_is_said():
    found = sweep([1e-4, 1e-3], bowl(1.0), max_extensions=2)
    assert not found.bracketed
    assert max(found.losses) == pytest.approx(1e-1)


def test_each_rate_is_tried_once():
    tried = []
    sweep([1e-3, 1e-4, 1e-3], lambda rate: tried.append(rate) or 1.0 / rate, max_extensions=2)
    assert len(tried) == len(set(tried)) == 4


def test_diverged_rates_lead_downwards_and_never_win():
    found = sweep([1e-2, 1e-1], lambda r: math.inf if r > 5e-3 else bowl(1e-4)(r), max_extensions=4)
    assert found.bracketed
    assert found.best_rate == pytest.approx(1e-4)


def test_all_diverged_is_not_bracketed():
    found = sweep([1e-2, 1e-1], lambda rate: math.inf, max_extensions=1)
    assert not found.bracketed
