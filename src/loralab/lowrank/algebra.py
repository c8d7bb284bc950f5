"""Sums of deltas through their factors: nothing here multiplies a whole delta out.

`linear` (and so scale, add, subtract, task arithmetic) is exact: factors side by side. KnOTS is
exact as well: it works in the deltas' common basis, whose coordinates are thin. TIES and DARE are
defined on the elements of the deltas; they see them in row blocks and end in an approximation
whose error is stated (`loralab.lowrank.streaming`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import AdapterError
from loralab.lowrank.compression import Approximation
from loralab.lowrank.factors import (
    Factors,
    Number,
    check_finite_number,
    check_same_shape,
    checked_core,
    delta_rows,
    working,
)
from loralab.lowrank.streaming import RowStream, approximate, kth_largest_magnitude

Consensus = Literal["sum", "sign"]
Pruning = Literal["magnitude", "random"]
Value = TypeVar("Value")


def scaled(factors: Factors, weight: Number) -> Factors:
    """`weight * delta`; the same object at weight 1."""
    return linear([factors], [weight])


def add(first: Factors, second: Factors) -> Factors:
    """`delta_1 + delta_2`, of rank at most rank_1 + rank_2."""
    return linear([first, second], [1.0, 1.0])


def subtract(first: Factors, second: Factors) -> Factors:
    """`delta_1 - delta_2`; exactly zero where both are the same."""
    return linear([first, second], [1.0, -1.0])


def linear(factors: Sequence[Factors], weights: Sequence[Number]) -> Factors:
    """`sum_i weight_i * delta_i`, exactly: `[w_1 B_1, w_2 B_2, ...] @ [A_1; A_2; ...]`.

    Pairs that share A add up their B instead of widening. A single pair at weight 1 is returned as
    it is; scales that all have one magnitude are kept, others are multiplied into B (one rounding
    of B). Raises `AdapterError` for shapes that differ and weights that are no finite numbers.
    """
    check_terms(factors, weights)
    if len(factors) == 1 and weights[0] == 1:
        return factors[0]
    scale = _common_scale(factors)
    groups = _grouped(factors, [w * p.scale / scale for p, w in zip(factors, weights, strict=True)])
    return Factors(
        A=torch.cat([A for A, _ in groups]), B=torch.cat([B for _, B in groups], dim=1), scale=scale
    )


def ties(
    factors: Sequence[Factors],
    weights: Sequence[Number],
    *,
    density: Number,
    rank: int | None = None,
    energy: Number | None = None,
    seed: int = 0,
) -> Approximation:
    """TIES merging (Yadav et al. 2023) of the deltas' elements, brought back to thin factors.

    Each delta keeps its `density` largest elements by magnitude (elements equal to the smallest
    kept one are all kept), each element's sign is elected by the sum of what was kept, and the
    weighted values of that sign are averaged over those that have it. A negative weight turns its
    delta round before the election. Default rank: the sum of the ranks.
    """
    check_terms(factors, weights)
    _check_density(density)
    factors = working(*factors)
    thresholds = [_threshold(_stream(pair), density) for pair in factors]

    def pruned(index: int, start: int, stop: int) -> Tensor:
        block = delta_rows(factors[index], start, stop)
        return torch.where(block.abs() >= thresholds[index], block, 0)

    return _merge_elements(factors, weights, pruned, "sign", rank, energy, seed)


def dare(
    factors: Sequence[Factors],
    weights: Sequence[Number],
    *,
    density: Number,
    consensus: Consensus = "sum",
    rank: int | None = None,
    energy: Number | None = None,
    seed: int = 0,
) -> Approximation:
    """DARE (Yu et al. 2024) of the deltas' elements, brought back to thin factors.

    Each element is kept with probability `density` and then divided by it, so that the expectation
    is the delta; `consensus` "sum" adds the results up (DARE-linear), "sign" elects signs as TIES
    does. Random zeros are noise of full rank: thin factors keep the part of it that is in their
    directions, so the stated error is large where density is small. Default rank: the sum of ranks.
    """
    check_terms(factors, weights)
    _check_density(density)
    factors = working(*factors)

    def dropped(index: int, start: int, stop: int) -> Tensor:
        block = delta_rows(factors[index], start, stop)
        return block * _kept(block, density, seed, index, start) / density

    return _merge_elements(factors, weights, dropped, consensus, rank, energy, seed)


def knots(
    factors: Sequence[Factors],
    weights: Sequence[Number],
    *,
    density: Number,
    pruning: Pruning = "magnitude",
    consensus: Consensus = "sign",
    seed: int = 0,
) -> Factors:
    """KnOTS (Stoica et al. 2024, 2410.19735): merge in the deltas' common basis. Exact, thin.

    `[delta_1, delta_2, ...] = U S [V_1', V_2', ...]` by a factored SVD; TIES or DARE then acts on
    the aligned `V_i'` (sum of ranks x in) instead of on the deltas, and the merge is `U S V'`. The
    default is KnOTS-TIES; density 1 with consensus "sum" is `linear`.
    """
    check_terms(factors, weights)
    _check_density(density)
    basis, coordinates = _common_basis(factors)
    if pruning == "magnitude":
        pruned = [_largest(V, density) for V in coordinates]
    else:
        pruned = [V * _kept(V, density, seed, i, 0) / density for i, V in enumerate(coordinates)]
    return Factors(A=_agree(pruned, weights, consensus), B=basis)


def check_terms(factors: Sequence[Factors], weights: Sequence[Number]) -> tuple[int, int]:
    """The common (out, in). Raises `AdapterError` for what cannot be summed."""
    if len(factors) != len(weights):
        raise AdapterError(
            f"{len(factors)} deltas but {len(weights)} weights", "give one weight a delta."
        )
    for weight in weights:
        check_finite_number(weight, "weight")
    return check_same_shape(factors)


def _check_density(density: Number) -> None:
    if not 0 < density <= 1:
        raise AdapterError(f"density {density} is no share", "give a density in (0, 1].")


def _grouped(
    factors: Sequence[Factors], coefficients: Sequence[Number]
) -> list[tuple[Tensor, Tensor]]:
    """(A, sum of coefficient * B) for each different A.

    Coefficients of the same B are added up before they touch it, so that a - a is exactly zero.
    """
    by_input: list[tuple[Tensor, list[tuple[Tensor, list[float]]]]] = []
    for pair, coefficient in zip(working(*factors), coefficients, strict=True):
        outputs = _find_or_add(by_input, pair.A)
        _find_or_add(outputs, pair.B).append(coefficient)
    return [
        (A, torch.stack([math.fsum(parts) * B for B, parts in outputs]).sum(0))
        for A, outputs in by_input
    ]


def _find_or_add(entries: list[tuple[Tensor, list[Value]]], key: Tensor) -> list[Value]:
    """The list kept for a tensor of these values; a new one where there is none."""
    for known, values in entries:
        if known.dtype == key.dtype and torch.equal(known, key):
            return values
    entries.append((key, []))
    return entries[-1][1]


def _common_scale(factors: Sequence[Factors]) -> float:
    """The magnitude that all scales share, so that it can stay outside of B; else 1."""
    magnitudes = {abs(pair.scale) for pair in factors}
    only = magnitudes.pop()
    return only if not magnitudes and only > 0 else 1.0


def _merge_elements(
    factors: Sequence[Factors],
    weights: Sequence[Number],
    pruned: Callable[[int, int, int], Tensor],
    consensus: Consensus,
    rank: int | None,
    energy: Number | None,
    seed: int,
) -> Approximation:
    """The approximation of the streamed merge of `pruned(which delta, start row, stop row)`."""

    def rows(start: int, stop: int) -> Tensor:
        blocks = [pruned(index, start, stop) for index in range(len(factors))]
        return _agree(blocks, weights, consensus)

    stream = RowStream(factors[0].shape, rows)
    if rank is None and energy is None:
        rank = min(sum(pair.rank for pair in factors), *stream.shape)
    return approximate(stream, rank=rank, energy=energy, seed=seed)


def _agree(blocks: list[Tensor], weights: Sequence[Number], consensus: Consensus) -> Tensor:
    """The weighted sum, or the weighted mean over the values whose sign won the election."""
    weighted = torch.stack([weight * block for block, weight in zip(blocks, weights, strict=True)])
    if consensus == "sum":
        return weighted.sum(0)
    # the votes are the values themselves, turned round by a negative weight, not scaled by it
    votes = torch.stack(
        [-block if weight < 0 else block for block, weight in zip(blocks, weights, strict=True)]
    )
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agreeing = votes.sign() == elected
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _stream(pair: Factors) -> RowStream:
    return RowStream(pair.shape, lambda start, stop: delta_rows(pair, start, stop))


def _threshold(stream: RowStream, density: Number) -> float:
    """The magnitude from which the `density` largest elements start."""
    count = int(density * math.prod(stream.shape))
    return kth_largest_magnitude(stream, count) if count else float("inf")


def _largest(matrix: Float[Tensor, "rows columns"], density: Number) -> Tensor:
    shape = (matrix.shape[0], matrix.shape[1])
    threshold = _threshold(RowStream(shape, lambda start, stop: matrix[start:stop]), density)
    return torch.where(matrix.abs() >= threshold, matrix, 0)


def _kept(block: Tensor, density: Number, seed: int, index: int, start: int) -> Tensor:
    """A mask that is the same each time this block of this delta is made."""
    mixed = ((seed * 1_000_003 + index) * 1_000_003 + start) % 2**63
    generator = torch.Generator().manual_seed(mixed)
    return (torch.rand(block.shape, generator=generator) < density).to(block)


def _common_basis(
    factors: Sequence[Factors],
) -> tuple[Float[Tensor, "out basis"], list[Tensor]]:
    """`U S` (out, basis) and each delta's coordinates `V_i'` (basis, in), basis <= sum of ranks."""
    pairs = working(*factors)
    q_out, r_out = torch.linalg.qr(torch.cat([pair.scale * pair.B for pair in pairs], dim=1))
    inputs = [torch.linalg.qr(pair.A.mT) for pair in pairs]
    # [delta_1, delta_2, ...] = q_out [r_out_1 r_in_1', r_out_2 r_in_2', ...] diag(q_in_i)'
    columns = r_out.split([pair.rank for pair in pairs], dim=1)
    small = torch.cat([part @ r.mT for part, (_, r) in zip(columns, inputs, strict=True)], dim=1)
    U, S, Vh = torch.linalg.svd(checked_core(small), full_matrices=False)
    parts = Vh.split([q.shape[1] for q, _ in inputs], dim=1)
    aligned = [part @ q.mT for part, (q, _) in zip(parts, inputs, strict=True)]
    return (q_out @ U) * S, aligned
