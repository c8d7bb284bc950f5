"""A change of a weight as two thin matrices, and what can be known without multiplying them out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import AdapterError

Number = float | int


@dataclass(frozen=True, eq=False)
class Factors:
    """`delta = scale * B @ A`, never multiplied out.

    A: (rank, in); B: (out, rank). A convolution's kernel counts as one flat matrix:
    in = in_channels / groups * kernel positions.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: Number = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in): the shape of the delta."""
        return self.B.shape[0], self.A.shape[1]

    def working(self) -> "Factors":
        """The same pair in the dtype that mathematics is done in: fp64 stays, the rest is fp32."""
        return working(self)[0]


def working(*factors: Factors) -> list[Factors]:
    """All pairs in one dtype for mathematics: fp64 where any tensor is, else fp32."""
    double = any(torch.float64 in (pair.A.dtype, pair.B.dtype) for pair in factors)
    dtype = torch.float64 if double else torch.float32
    return [
        pair
        if pair.A.dtype == pair.B.dtype == dtype
        else replace(pair, A=pair.A.to(dtype), B=pair.B.to(dtype))
        for pair in factors
    ]


def delta(factors: Factors) -> Float[Tensor, "out in"]:
    """`scale * B @ A` as a full matrix, in fp32 (fp64 for fp64 factors)."""
    pair = factors.working()
    return (pair.scale * pair.B) @ pair.A


def delta_rows(factors: Factors, start: int, stop: int) -> Float[Tensor, "rows in"]:
    """Rows `start:stop` of the delta; all that streaming callers ever hold of it."""
    pair = factors.working()
    return (pair.scale * pair.B[start:stop]) @ pair.A


def frobenius_norm(factors: Factors) -> float:
    """`||delta||_F`, from the core of two QR decompositions (no cancellation as in a Gram sum)."""
    return float(torch.linalg.matrix_norm(core(factors)))


def inner_product(first: Factors, second: Factors) -> float:
    """`<delta_1, delta_2>_F = tr(A_2 A_1' B_1' B_2)`: rank x rank work after two thin products."""
    check_same_shape((first, second))
    one, two = working(first, second)
    # fp64 sums: the terms of a nearly orthogonal pair cancel
    outputs = (one.B.mT @ two.B).double()
    inputs = (one.A @ two.A.mT).double()
    return one.scale * two.scale * float((outputs * inputs).sum())


def cosine(first: Factors, second: Factors) -> float:
    """The cosine between two deltas seen as vectors; 0 where one of them is zero."""
    norms = frobenius_norm(first) * frobenius_norm(second)
    return inner_product(first, second) / norms if norms > 0 else 0.0


def core(factors: Factors) -> Float[Tensor, "small_out small_in"]:
    """`scale * R_B R_A'` of B = Q_B R_B and A' = Q_A R_A: it has the delta's singular values."""
    pair = factors.working()
    r_out = torch.linalg.qr(pair.B, mode="r").R
    r_in = torch.linalg.qr(pair.A.mT, mode="r").R
    return checked_core(pair.scale * (r_out @ r_in.mT))


def checked_core(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The matrix itself; a NaN or Inf anywhere in the factors ends up in the core and raises."""
    if not bool(torch.isfinite(matrix).all()):
        raise AdapterError(
            "a factor pair holds NaN or Inf (or overflows when multiplied)",
            "train again with a lower learning rate, or take an earlier checkpoint.",
        )
    return matrix


def check_same_shape(factors: Sequence[Factors]) -> tuple[int, int]:
    """The one (out, in) of all the deltas. Raises `AdapterError` where they differ or none is."""
    shapes = {pair.shape for pair in factors}
    if len(shapes) != 1:
        found = ", ".join(f"{out} x {into}" for out, into in sorted(shapes)) or "none"
        raise AdapterError(
            f"deltas of one and the same shape are needed, found: {found}",
            "combine only adapters of the same base model.",
        )
    return shapes.pop()


def check_finite_number(value: Number, name: str) -> Number:
    """The value itself. Raises `AdapterError` for NaN and Inf."""
    if not math.isfinite(value):
        raise AdapterError(f"{name} is {value}, not a finite number", f"give a finite {name}.")
    return value
