"""Numbers as people read them."""

import math

import pytest

from loralab.reports import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_235_818_498, "1.24 B"),
        (11_272_192, "11.3 M"),
        (505_960_450, "506 M"),
        (999_600, "1.00 M"),
        (770, "770"),
        (0, "0"),
        (175_181_291_520, "175 B"),
    ],
)
def test_counts_have_three_digits(value: int, text: str) -> None:
    assert formats.count(value).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (22_086_923_550, "20.57 GiB"),
        (2**30, "1.00 GiB"),
        (45_193_625, "43.1 MiB"),
        (3568, "3.5 KiB"),
        (512, "512 B"),
    ],
)
def test_sizes_are_binary(value: int, text: str) -> None:
    assert formats.data_size(value).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0.40 ms"),
        (0.412, "412 ms"),
        (0.9999, "1.00 s"),
        (3.214, "3.21 s"),
        (59.99, "1 min 00 s"),
        (441, "7 min 21 s"),
        (7530, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert formats.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


def test_rates_are_written_as_in_a_recipe() -> None:
    rates = (2e-4, 1e-2, 3.3e-5, 1.0)
    assert [formats.rate(rate) for rate in rates] == ["2e-4", "1e-2", "3.3e-5", "1e0"]
    assert all(float(formats.rate(rate)) == rate for rate in rates)


def test_signs_are_true_and_zero_has_none() -> None:
    assert formats.points(-0.0123) == "−1.23"
    assert formats.points(0.0123) == "+1.23"
    assert formats.number(-0.0001, 2, signed=True) == "0.00"
    assert formats.span("−0.1", "+0.2") == "−0.1 to +0.2"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "text", True])
def test_what_is_no_figure_is_a_dash(value: object) -> None:
    for write in (
        formats.count,
        formats.data_size,
        formats.duration,
        formats.percent,
        formats.p_value,
        formats.points,
        formats.rate,
    ):
        assert write(value) == formats.MISSING


def test_small_p_values_are_not_zero() -> None:
    assert formats.p_value(1e-9) == "<\N{THIN SPACE}0.001"
    assert formats.p_value(0.0344) == "0.034"
