"""The judges of images, on real ones; the distance, against its definition."""

from pathlib import Path

import numpy
import pytest
import scipy.linalg
import torch
from PIL import Image

from loralab.imaging import (
    STYLES,
    Digits,
    Judges,
    base_is_no_style,
    digit_accuracy,
    frechet_distance,
    load_digits,
    stack,
    style_accuracy,
    style_shares,
    styled,
    train_judges,
    write_grid,
)
from loralab.imaging.judging import _frechet

pytestmark = pytest.mark.xdist_group("judges")  # one worker makes what its tests share


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def judges(digits: Digits) -> Judges:
    return train_judges(digits.held_out)


def test_judges_are_right_about_real_images(judges: Judges, digits: Digits) -> None:
    assert judges.digit_check >= 0.95 and judges.style_check >= 0.95
    rows = digits.train[:300]  # seen by neither judge
    labels = [row.label for row in rows]
    assert base_is_no_style(judges, stack(rows)) >= 0.95
    for style in STYLES:
        images = stack(styled(rows, style))
        assert style_accuracy(judges, images, style) >= 0.95
        assert digit_accuracy(judges, images, labels) >= 0.92
        assert style_shares(judges, images)[style] >= 0.9


def test_the_distance_is_least_for_the_same_style(judges: Judges, digits: Digits) -> None:
    real, other = stack(digits.train[:150]), digits.train[150:300]
    near = frechet_distance(judges, stack(other), real, resamples=30)
    far = frechet_distance(judges, stack(styled(other, "chalk")), real, resamples=30)
    assert near.low <= near.value <= near.high < far.low <= far.value
    assert frechet_distance(judges, real, real, resamples=2).value == pytest.approx(0, abs=1e-6)


def test_the_distance_is_its_definition() -> None:
    draw = numpy.random.default_rng(0)
    ours, theirs = draw.normal(size=(200, 6)), draw.normal(size=(150, 6)) @ draw.normal(size=(6, 6))
    covariances = [numpy.cov(rows.T) for rows in (ours, theirs)]
    root = numpy.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
    expected = numpy.square(ours.mean(0) - theirs.mean(0)).sum()
    expected += numpy.trace(covariances[0] + covariances[1] - 2 * root)
    assert _frechet(ours, theirs) == pytest.approx(expected, rel=1e-8)


def test_a_grid_has_every_image_at_its_place(tmp_path: Path) -> None:
    white, black = torch.ones(1, 4, 4), -torch.ones(1, 4, 4)
    path = tmp_path / "deep" / "grid.png"
    write_grid([[white, black], [black, white]], path, row_names=["a", "b"], zoom=3)
    with Image.open(path) as sheet:
        assert sheet.size == (72 + 2 * 14, 2 * 14)
        corners = [sheet.getpixel((72 + x, y)) for y in (5, 19) for x in (5, 19)]
    assert corners == [(255,) * 3, (0,) * 3, (0,) * 3, (255,) * 3]
