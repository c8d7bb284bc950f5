"""The digits and their styles: fixed, disjoint, visibly different."""

import itertools

import pytest
import torch

from loralab.data import Row
from loralab.errors import ConfigError
from loralab.imaging import STYLES, Digits, load_digits, stack, styled


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


def test_splits_are_disjoint_and_whole(digits: Digits) -> None:
    train, held_out = ({row.id for row in part} for part in (digits.train, digits.held_out))
    assert not train & held_out
    assert len(train) + len(held_out) == 1797
    assert {row.label for row in digits.train} == set(range(10))


def test_the_split_is_the_same_every_time(digits: Digits) -> None:
    assert [row.id for row in load_digits().train] == [row.id for row in digits.train]


def test_images_are_large_and_within_bounds(digits: Digits) -> None:
    images = stack(digits.train)
    assert images.shape[1:] == (1, 32, 32)
    assert images.min() == -1 and images.max() == 1


def test_rows_are_rows_of_training(digits: Digits) -> None:
    one, other = digits.train[:2]
    assert isinstance(one, Row)
    assert one.num_tokens == one.num_targets == 1
    assert one.content() == one.content() != other.content()


def test_styles_are_deterministic(digits: Digits) -> None:
    rows = digits.train[:20]
    for style in STYLES:
        again = stack(styled(rows, style))
        assert torch.equal(stack(styled(rows, style)), again)
        assert again.min() >= -1 and again.max() <= 1


def test_styles_are_further_apart_than_digits_of_a_class(digits: Digits) -> None:
    rows = digits.train[:200]
    looks = {style: stack(styled(rows, style)) for style in ("plain", *STYLES)}
    for one, other in itertools.combinations(looks, 2):
        apart = (looks[one] - looks[other]).abs().mean((1, 2, 3))
        assert apart.min() > 0.05, (one, other)


def test_styled_rows_are_named_after_their_style(digits: Digits) -> None:
    row = digits.train[0]
    (bold,) = styled([row], "bold")
    assert bold.id == f"{row.id}/bold" and bold.group == row.group and bold.label == row.label


def test_an_unknown_style_is_named(digits: Digits) -> None:
    with pytest.raises(ConfigError, match=r"unknown style 'blod'\n  Next: did you mean 'bold'\?"):
        styled(digits.train[:1], "blod")
