"""Fewer directions for the same delta, with the error that this costs."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import AdapterError
from loralab.lowrank.factors import Factors, Number
from loralab.lowrank.spectra import SVD, energy, factored_svd, numerical_rank


@dataclass(frozen=True, eq=False)
class Approximation:
    """Factors that stand for some matrix, and what they miss of it."""

    factors: Factors
    error: float  # ||matrix - delta||_F
    relative_error: float  # error / ||matrix||_F; 0 for a zero matrix


def truncate(
    factors: Factors, *, rank: int | None = None, energy: Number | None = None
) -> Approximation:
    """The best delta of at most `rank` (or with at least the share `energy` of the squared norm).

    No factors of that rank come closer (Eckart, Young, Mirsky): the error is
    `sqrt(sum of the dropped s_i^2)`. Factors that are small enough already come back untouched.
    `energy=1.0` drops only what is rounding error. Exactly one of the two must be given.
    """
    check_size(rank, energy)
    if rank is not None and rank >= factors.rank:
        return Approximation(factors, error=0.0, relative_error=0.0)
    svd = factored_svd(factors)
    kept = rank if rank is not None else rank_for_energy(svd, energy or 1.0)
    if energy is not None and kept >= factors.rank:
        return Approximation(factors, error=0.0, relative_error=0.0)
    error = float(torch.linalg.vector_norm(svd.S[kept:].double()))
    total = float(torch.linalg.vector_norm(svd.S.double()))
    return Approximation(balanced(svd, kept), error, error / total if total > 0 else 0.0)


def balanced(svd: SVD, rank: int) -> Factors:
    """The top directions as factors of equal norm: `B = U sqrt(S)`, `A = sqrt(S) Vh`, scale 1."""
    root = svd.S[:rank].sqrt()
    return Factors(A=root[:, None] * svd.Vh[:rank], B=svd.U[:, :rank] * root)


def rank_for_energy(svd: SVD, share: Number) -> int:
    """The least rank (at least 1) whose directions hold `share` of the squared norm."""
    return rank_of_values(svd.S, share, max(svd.U.shape[0], svd.Vh.shape[1]))


def rank_of_values(values: Float[Tensor, "kept"], share: Number, largest_dimension: int) -> int:
    """As `rank_for_energy`, for singular values alone."""
    limit = max(1, numerical_rank(values, largest_dimension))
    if share >= 1:
        return limit
    enough = int((energy(values) < share).sum()) + 1
    return min(enough, limit)


def check_size(rank: int | None, share: Number | None) -> None:
    """Raises `AdapterError` unless exactly one of rank and energy is given, and sensible."""
    if (rank is None) == (share is None):
        raise AdapterError(
            "truncation needs either a rank or an energy", "give exactly one of the two."
        )
    if rank is not None and rank < 1:
        raise AdapterError(f"rank {rank} is no rank", "give a rank of at least 1.")
    if share is not None and not (math.isfinite(share) and 0 < share <= 1):
        raise AdapterError(f"energy {share} is no share", "give an energy in (0, 1], such as 0.99.")
