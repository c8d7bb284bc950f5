"""What is called with the wrong type or shape is found by the tests of whatever calls it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from loralab.config import parse_config
from loralab.lowrank import dense_svd

checked: Callable = jaxtyping.jaxtyped(typechecker=beartype)  # as the import hook calls it


@checked
def product(
    a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"], *, cut: int = 0
) -> Float[Tensor, "rows columns"]:
    return (a @ b)[cut:]


@checked
def twice(a: Float[Tensor, "rows rows"]) -> Float[Tensor, "rows rows"]:
    assert product(torch.ones(5, 3), torch.ones(3, 7)).shape == (5, 7)  # a scope of its own
    return 2 * a


@checked
def doubled(word: str, wanted: "str") -> str:
    return word * 2 if wanted == "str" else wanted


@checked
def rows_of(a: Float[Tensor, "rows width"]) -> Iterator[Float[Tensor, " width"]]:
    yield from a


@checked
@dataclass
class Pair:
    a: Float[Tensor, "rank inner"]
    b: Float[Tensor, "outer rank"]


def test_what_agrees_passes() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert twice(torch.ones(2, 2)).sum() == 8
    assert doubled("ab", "str") == "abab"
    assert len(list(rows_of(torch.ones(2, 3)))) == 2
    assert Pair(torch.ones(2, 3), torch.ones(4, 2)).a.shape == (2, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: product(torch.ones(2, 3), torch.ones(4, 3)),  # sizes of one axis
        lambda: product(torch.ones(2, 3), torch.ones(3)),  # how many axes
        lambda: product(torch.ones(2, 3), torch.ones(3, 4, dtype=torch.int32)),
        lambda: product(torch.ones(2, 3), torch.ones(3, 4), cut=1),  # what comes back
        lambda: product(torch.ones(2, 3), torch.ones(3, 4), cut=0.0),  # pyright: ignore
        lambda: twice(torch.ones(2, 3)),
        lambda: doubled(3, "str"),  # pyright: ignore
        lambda: list(rows_of(torch.ones(3))),
        lambda: Pair(torch.ones(2, 3), torch.ones(4, 3)),
        lambda: dense_svd(torch.ones(3)),
        lambda: parse_config("no tables"),  # pyright: ignore
    ],
)
def test_what_does_not_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        wrong()
