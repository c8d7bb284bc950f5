"""Laws of the lines in a chart."""

import math

import pytest

from loralab.reports import series


@pytest.mark.parametrize("span", [1, 7, 100])
def test_a_constant_stays_what_it_is(span: int) -> None:
    smoothed = series.smooth([[step, 0.7] for step in range(1, 50)], span)
    assert [loss for _, loss in smoothed] == pytest.approx([0.7] * 49)


def test_smoothing_over_one_point_changes_nothing() -> None:
    losses = [[1, 0.9], [2, 0.1], [3, 0.5]]
    assert [list(point) for point in series.smooth(losses, 1)] == losses


def test_what_is_not_finite_is_left_out() -> None:
    smoothed = series.smooth([[1, 0.5], [2, math.nan], [3, None], [4, 0.5]], 10)
    assert [step for step, _ in smoothed] == [1, 4]


def test_a_long_line_is_thinned_and_keeps_its_end() -> None:
    kept = series.thin([(step, 0.0) for step in range(10_001)])
    assert len(kept) <= series.MAX_POINTS + 1
    assert kept[0][0] == 0
    assert kept[-1][0] == 10_000


@pytest.mark.parametrize("values", [[0.4, 0.5], [0.01, 9.0], [0.5], [0.0, 0.0], [None, 0.3], []])
def test_an_axis_has_room_around_its_values(values: list[float | None]) -> None:
    low, high = series.padded_range(values)
    known = [value for value in values if value is not None] or [0.5]
    assert low < min(known) <= max(known) < high


def test_a_logarithmic_axis_stays_positive() -> None:
    low, high = series.padded_range([0.01, 9.0])
    assert 0 < low < 0.01
    assert high > 9.0
