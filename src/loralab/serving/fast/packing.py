"""An adapter's factors as the kernel reads them: one piece of memory, ranks in fours.

Per block: A of the layers that read one input, one after another, then their B, cut in tiles of 32
outputs. So what the kernel reads together lies together.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from loralab.serving.fast.coverage import Factors, Table
from loralab.serving.fast.structures import Packing, Pair

RANK_MULTIPLE, TILE_OUTPUTS, LINE_BYTES = 4, 32, 64
_INPUTS = ((0, 1, 2), (3,), (4, 5), (6,))
"""The projections of a block by the input they read."""


class Packed(NamedTuple):
    """pairs: of every block and projection, pointing into `memory`."""

    pairs: "ctypes.Array[Pair]"
    memory: Tensor
    most_rank: int


class Copies(NamedTuple):
    """What the kernel copies. factors: kept alive, since `jobs` has their addresses alone."""

    jobs: "ctypes.Array[Packing]"
    factors: list[tuple[Tensor, Tensor]]


def pack(table: Table, dtype: torch.dtype, spare: Tensor | None = None) -> tuple[Copies, Packed]:
    """The adapter's places, and the copies that fill them (the kernel makes them).

    spare: memory of an adapter that has gone, used again where it is large enough.
    """
    pieces = [piece for number, block in enumerate(table) for piece in _pieces(number, block)]
    sizes = [_bytes(factors, is_A, dtype) for _, factors, is_A in pieces]
    needed = sum(sizes) + LINE_BYTES
    fits = spare is not None and needed <= len(spare) <= 2 * needed
    memory = spare if fits and spare is not None else torch.empty(needed, dtype=torch.uint8)
    pairs = (Pair * sum(map(len, table)))()
    at = _aligned(memory.data_ptr())
    for (index, factors, is_A), size in zip(pieces, sizes, strict=True):
        pair = pairs[index]
        pair.rank, pair.scale = _padded(factors), factors.scale
        setattr(pair, "A" if is_A else "B", at)
        at += size
    ready = {index: _ready(factors) for index, factors, is_A in pieces if is_A}
    jobs = (Packing * len(ready))()
    for job, (index, (A, B)) in zip(jobs, ready.items(), strict=True):
        job.A, job.B = A.data_ptr(), B.data_ptr()
        (job.rank, job.inputs), job.outputs = A.shape, B.shape[0]
        job.to_A, job.to_B = pairs[index].A, pairs[index].B
    most_rank = max((pair.rank for pair in pairs), default=0)
    return Copies(jobs, list(ready.values())), Packed(pairs, memory, most_rank)


def _pieces(number: int, block: list[Factors | None]) -> list[tuple[int, Factors, bool]]:
    """(place among all pairs, factors, whether it is A) in the order of memory."""
    found = []
    for members in _INPUTS:
        present = [(member, each) for member in members if (each := block[member]) is not None]
        for is_A in (True, False):
            found += [(number * len(block) + member, each, is_A) for member, each in present]
    return found


def _bytes(factors: Factors, is_A: bool, dtype: torch.dtype) -> int:
    outputs = -(-factors.B.shape[0] // TILE_OUTPUTS) * TILE_OUTPUTS
    numbers = factors.A.shape[1] if is_A else outputs
    return _aligned(_padded(factors) * numbers * dtype.itemsize)


def _padded(factors: Factors) -> int:
    return -(-factors.A.shape[0] // RANK_MULTIPLE) * RANK_MULTIPLE


def _ready(factors: Factors) -> tuple[Tensor, Tensor]:
    return factors.A.float().contiguous(), factors.B.float().contiguous()


def _aligned(number: int) -> int:
    return -(-number // LINE_BYTES) * LINE_BYTES
