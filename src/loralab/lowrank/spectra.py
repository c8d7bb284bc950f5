"""The singular values and directions of a delta through its factors: rank x rank work."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import AdapterError
from loralab.lowrank.factors import Factors, checked_core, core

Side = Literal["in", "out"]


@dataclass(frozen=True, eq=False)
class SVD:
    """`delta = U @ diag(S) @ Vh`, S falling; at most rank values are kept."""

    U: Float[Tensor, "out kept"]
    S: Float[Tensor, "kept"]
    Vh: Float[Tensor, "kept in"]

    @property
    def numerical_rank(self) -> int:
        """How many singular values stand above rounding error."""
        return numerical_rank(self.S, max(self.U.shape[0], self.Vh.shape[1]))


def factored_svd(factors: Factors) -> SVD:
    """The exact thin SVD of `scale * B @ A`: QR of both factors, then an SVD of rank x rank.

    An 8192 x 2048 delta of rank 16 takes about a millisecond; the dense SVD takes seconds.
    Raises `AdapterError` for factors with NaN or Inf.
    """
    pair = factors.working()
    q_out, r_out = torch.linalg.qr(pair.B)
    q_in, r_in = torch.linalg.qr(pair.A.mT)
    U, S, Vh = torch.linalg.svd(checked_core(pair.scale * (r_out @ r_in.mT)), full_matrices=False)
    return SVD(U=q_out @ U, S=S, Vh=Vh @ q_in.mT)


def singular_values(factors: Factors) -> Float[Tensor, "kept"]:
    """The delta's singular values, falling; at most rank of them."""
    return torch.linalg.svdvals(core(factors))


def numerical_rank(values: Float[Tensor, "kept"], largest_dimension: int) -> int:
    """How many values exceed `largest dimension * eps * largest value` (the rule of numpy)."""
    if not len(values) or float(values[0]) == 0:
        return 0
    tolerance = largest_dimension * torch.finfo(values.dtype).eps * float(values[0])
    return int((values > tolerance).sum())


def energy(values: Float[Tensor, "kept"]) -> Float[Tensor, "kept"]:
    """`E(k) = sum_{i<=k} s_i^2 / sum s_i^2`, the share of the squared norm that k directions hold.

    All ones for a zero delta: nothing is missing at any k.
    """
    squares = values.double() ** 2
    total = squares.sum()
    if float(total) == 0:
        return torch.ones_like(squares)
    return squares.cumsum(0) / total


def stable_rank(values: Float[Tensor, "kept"]) -> float:
    """`||delta||_F^2 / s_1^2`: 1 for one direction, rank for equal ones; 0 for a zero delta."""
    squares = values.double() ** 2
    return float(squares.sum() / squares[0]) if len(values) and float(values[0]) > 0 else 0.0


def effective_rank(values: Float[Tensor, "kept"]) -> float:
    """`exp(-sum p log p)` with `p = s^2 / sum s^2` (Roy & Vetterli 2007); 0 for a zero delta."""
    squares = values.double() ** 2
    total = squares.sum()
    if float(total) == 0:
        return 0.0
    return float(torch.special.entr(squares / total).sum().exp())


def overlap(
    first: Factors, second: Factors, num_first: int, num_second: int, side: Side = "in"
) -> float:
    """`phi = ||D_1' D_2||_F^2 / min(i, j)` of the top i and j singular directions, in [0, 1].

    Hu et al. 2021, equation 4, but on the singular vectors of the *delta*: those of A alone change
    when (B, A) is rewritten as (B M, M^-1 A), which is the same delta. `random_overlap` is what
    unrelated subspaces give. Raises `AdapterError` for more directions than a delta has.
    """
    table = overlap_table(first, second, side)
    limits = tuple(table.shape)
    if not (1 <= num_first <= limits[0] and 1 <= num_second <= limits[1]):
        raise AdapterError(
            f"overlap of {num_first} and {num_second} directions: the deltas have"
            f" {limits[0]} and {limits[1]}",
            "ask for fewer directions.",
        )
    return float(table[num_first - 1, num_second - 1])


def overlap_table(
    first: Factors, second: Factors, side: Side = "in"
) -> Float[Tensor, "num_first num_second"]:
    """`phi(i, j)` for every i and j up to the numerical ranks (entry [i - 1, j - 1])."""
    one, two = _directions(first, side), _directions(second, side)
    if one.shape[1] != two.shape[1]:
        raise AdapterError(
            f"overlap of deltas with {one.shape[1]} and {two.shape[1]} features on side {side!r}",
            "compare deltas of the same module.",
        )
    return subspace_overlap(one, two)


def subspace_overlap(
    first: Float[Tensor, "num_first features"], second: Float[Tensor, "num_second features"]
) -> Float[Tensor, "num_first num_second"]:
    """`phi(i, j)` of the first i and j rows, where both have orthonormal rows."""
    shared = (first @ second.mT).double().square().cumsum(0).cumsum(1)
    i = torch.arange(1, shared.shape[0] + 1).unsqueeze(1)
    j = torch.arange(1, shared.shape[1] + 1).unsqueeze(0)
    return shared / torch.minimum(i, j)


def random_overlap(num_first: int, num_second: int, num_features: int) -> float:
    """The expected `phi` of two random subspaces: `i j / d / min(i, j) = max(i, j) / d`."""
    return max(num_first, num_second) / num_features


def random_overlap_std(num_first: int, num_second: int, num_features: int) -> float:
    """The standard deviation of `phi` of two random subspaces.

    `tr(P Q)` of random projections on i and j of d dimensions has the variance
    `2 i j (d - i) (d - j) / (d^2 (d - 1) (d + 2))`.
    """
    i, j, d = num_first, num_second, num_features
    if d < 2:
        return 0.0
    variance = 2 * i * j * (d - i) * (d - j) / (d**2 * (d - 1) * (d + 2))
    return max(0.0, variance) ** 0.5 / min(i, j)


def amplification(
    factors: Factors, weight: Float[Tensor, "out in"], num_directions: int | None = None
) -> float:
    """`||delta||_F / ||U' W V||_F` over the delta's top directions (Hu et al. 2021, table 7).

    How much stronger the delta acts along its own directions than the weight did.
    """
    svd = factored_svd(factors)
    kept = num_directions or svd.numerical_rank
    U, Vh = svd.U[:, :kept], svd.Vh[:kept]
    projected = U.mT @ weight.to(U.dtype) @ Vh.mT
    return float(torch.linalg.vector_norm(svd.S[:kept]) / torch.linalg.matrix_norm(projected))


def _directions(factors: Factors, side: Side) -> Float[Tensor, "kept features"]:
    svd = factored_svd(factors)
    kept = svd.numerical_rank
    return svd.Vh[:kept] if side == "in" else svd.U[:, :kept].mT
