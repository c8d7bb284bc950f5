"""Matrices that exist only as row blocks, one at a time.

TIES and DARE choose single *elements* of deltas, so their result is no product of thin factors and
every element must be looked at. It need not be held: a `RowStream` makes the same row blocks anew
on each pass, exact order statistics come from counting, and thin factors from a randomised SVD
whose error is measured, not estimated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.lowrank.compression import Approximation, balanced, check_size, rank_of_values
from loralab.lowrank.factors import Factors, Number
from loralab.lowrank.spectra import SVD

BLOCK_ELEMENTS = 1 << 20  # 4 MiB in fp32: stays in cache
DIGIT_BITS = 16


@dataclass(frozen=True)
class RowStream:
    """A matrix of shape (out, in) given as a function from a row range to those rows.

    `rows` must give the same bits each time it is asked for the same range.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The row ranges: fixed by the shape, never more than half of a matrix of two rows up."""
        out, into = self.shape
        height = max(1, min(BLOCK_ELEMENTS // max(into, 1), -(-out // 2)))
        for start in range(0, out, height):
            yield start, min(start + height, out)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Each row range with its rows (rows, in)."""
        for start, stop in self.ranges():
            yield slice(start, stop), self.rows(start, stop)


def kth_largest_magnitude(stream: RowStream, k: int) -> float:
    """The k-th largest |element| (k from 1), exactly, by counting 16 bits of the values a pass.

    Magnitudes of floats sort as their bit patterns do: two passes in fp32, four in fp64.
    """
    prefix, above, bits = 0, 0, _bits_of(stream)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        for _, block in stream.blocks():
            keys = _keys(block)
            keys = keys[keys >> (shift + DIGIT_BITS) == prefix]
            digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
            counts += torch.bincount(digits, minlength=1 << DIGIT_BITS).cpu()
        from_top = counts.flip(0).cumsum(0) + above
        digit_from_top = int((from_top < k).sum())
        above = int(from_top[digit_from_top - 1]) if digit_from_top else above
        prefix = (prefix << DIGIT_BITS) | ((1 << DIGIT_BITS) - 1 - digit_from_top)
    key = torch.tensor(prefix, dtype=torch.int32 if bits == 32 else torch.int64)
    return float(key.view(torch.float32 if bits == 32 else torch.float64))


def approximate(
    stream: RowStream,
    *,
    rank: int | None = None,
    energy: Number | None = None,
    seed: int = 0,
    num_iterations: int = 4,
    oversampling: int = 16,
) -> Approximation:
    """Thin factors near the streamed matrix, and how far they are from it.

    A randomised subspace iteration (Halko, Martinsson, Tropp 2011), not the optimal rank-`rank`
    matrix but close to it; the error given is the measured `||matrix - delta||_F`. With `energy`,
    the subspace grows until it holds that share of the squared norm. Holds only matrices with
    rank + oversampling columns and one row block.
    """
    check_size(rank, energy)
    total = sum(float(block.double().square().sum()) for _, block in stream.blocks())
    width = (rank if rank is not None else 16) + oversampling
    while True:
        svd = _randomised_svd(stream, min(width, *stream.shape), num_iterations, seed)
        if rank is not None:
            kept = min(rank, len(svd.S))
            break
        held = svd.S.double().square().cumsum(0)
        if float(held[-1]) >= (energy or 1.0) * total or len(svd.S) == min(stream.shape):
            kept = _rank_holding(svd, (energy or 1.0) * total)
            break
        width *= 2
    factors = balanced(svd, kept)
    error = _distance(stream, factors)
    return Approximation(factors, error, error / total**0.5 if total > 0 else 0.0)


def _randomised_svd(stream: RowStream, width: int, num_iterations: int, seed: int) -> SVD:
    generator = torch.Generator().manual_seed(seed)
    first = next(stream.blocks())[1]
    probes = torch.randn(stream.shape[1], width, generator=generator).to(first)
    Q = torch.linalg.qr(_times(stream, probes)).Q
    for _ in range(num_iterations):
        Q = torch.linalg.qr(_times(stream, torch.linalg.qr(_transposed_times(stream, Q)).Q)).Q
    U, S, Vh = torch.linalg.svd(_transposed_times(stream, Q).mT, full_matrices=False)
    return SVD(U=Q @ U, S=S, Vh=Vh)


def _rank_holding(svd: SVD, squared_norm: float) -> int:
    enough = int((svd.S.double().square().cumsum(0) < squared_norm).sum()) + 1
    return min(enough, rank_of_values(svd.S, 1.0, max(svd.U.shape[0], svd.Vh.shape[1])))


def _times(stream: RowStream, columns: Float[Tensor, "in width"]) -> Float[Tensor, "out width"]:
    return torch.cat([block @ columns for _, block in stream.blocks()])


def _transposed_times(
    stream: RowStream, columns: Float[Tensor, "out width"]
) -> Float[Tensor, "in width"]:
    total = columns.new_zeros(stream.shape[1], columns.shape[1])
    for rows, block in stream.blocks():
        total.addmm_(block.mT, columns[rows])
    return total


def _distance(stream: RowStream, factors: Factors) -> float:
    squared = 0.0
    for rows, block in stream.blocks():
        squared += float((block - factors.B[rows] @ factors.A).double().square().sum())
    return squared**0.5


def _bits_of(stream: RowStream) -> int:
    return 8 * next(stream.blocks())[1].element_size()


def _keys(block: Tensor) -> Tensor:
    integers = torch.int32 if block.element_size() == 4 else torch.int64
    return block.abs().flatten().view(integers)
