"""An adapter's factors as the kernel reads them: one piece of memory, ranks in fours.

Per block: A of the layers that read one input, one after another, then their B, cut in tiles of 32
outputs. So what the kernel reads together lies together.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from loralab.adapters import fresh_bytes
from loralab.serving.fast.coverage import Factors, Table
from loralab.serving.fast.structures import Packing, Pair

RANK_MULTIPLE, TILE_OUTPUTS, LINE_BYTES = 4, 32, 64
_INPUTS = ((0, 1, 2), (3,), (4, 5), (6,))
"""The projections of a block by the input they read."""
_Size = tuple[int, int, int]
"""Rank, inputs and outputs of a pair."""


class Packed(NamedTuple):
    """pairs: of every block and projection, pointing into `memory`."""

    pairs: "ctypes.Array[Pair]"
    memory: Tensor
    most_rank: int


class Copies(NamedTuple):
    """What the kernel copies. factors: kept alive, since `jobs` has their addresses alone."""

    jobs: "ctypes.Array[Packing]"
    factors: list[Tensor]


def pack(table: Table, dtype: torch.dtype) -> tuple[Copies, Packed]:
    """The adapter's places, and the copies that fill them (the kernel makes them)."""
    given = [factors for block in table for factors in block]
    sizes = tuple(None if factors is None else _size(factors) for factors in given)
    layout = _layout(sizes, len(table[0]), dtype.itemsize)
    memory = fresh_bytes(layout.num_bytes + LINE_BYTES)
    start = _aligned(memory.data_ptr())
    factors = [_ready(factor) for each in given if each is not None for factor in each[:2]]
    addresses = np.array([factor.data_ptr() for factor in factors], dtype=np.int64).reshape(-1, 2)

    jobs = (Packing * len(layout.present))()
    job = _fields(jobs)
    job["A"], job["B"] = addresses[:, 0], addresses[:, 1]
    job["rank"], job["inputs"], job["outputs"] = layout.sizes.T
    job["to_A"], job["to_B"] = start + layout.A, start + layout.B

    pairs = (Pair * len(given))()
    pair = _fields(pairs)
    at = layout.present
    pair["A"][at], pair["B"][at] = start + layout.A, start + layout.B
    pair["rank"][at] = layout.ranks
    pair["scale"][at] = [each.scale for each in given if each is not None]
    return Copies(jobs, factors), Packed(pairs, memory, int(layout.ranks.max(initial=0)))


class _Layout(NamedTuple):
    """Where the pairs of adapters of one shape are, counted in bytes from the first.

    present: numbers of the pairs that there are; all others are by these. ranks: in fours.
    """

    num_bytes: int
    present: Int64[np.ndarray, " pairs"]
    sizes: Int64[np.ndarray, "pairs 3"]
    ranks: Int64[np.ndarray, " pairs"]
    A: Int64[np.ndarray, " pairs"]
    B: Int64[np.ndarray, " pairs"]


@functools.lru_cache(maxsize=32)
def _layout(sizes: tuple[_Size | None, ...], per_block: int, item_bytes: int) -> _Layout:
    """The layout for pairs of these sizes, so many a block; None where a block has none."""
    starts: dict[tuple[int, bool], int] = {}
    end = 0
    for first in range(0, len(sizes), per_block):
        for members in _INPUTS:
            here = [(first + m, s) for m in members if (s := sizes[first + m]) is not None]
            for is_A in (True, False):
                for index, size in here:
                    starts[index, is_A] = end
                    end += _bytes(size, is_A, item_bytes)
    present = [index for index, size in enumerate(sizes) if size is not None]
    found = [size for size in sizes if size is not None]
    return _Layout(
        end,
        np.array(present, dtype=np.int64),
        np.array(found, dtype=np.int64).reshape(-1, 3),
        np.array([_multiple(rank, RANK_MULTIPLE) for rank, _, _ in found], dtype=np.int64),
        np.array([starts[index, True] for index in present], dtype=np.int64),
        np.array([starts[index, False] for index in present], dtype=np.int64),
    )


def _fields(structures: "ctypes.Array[Any]") -> Any:
    """The structures as numpy sees them: all values of a field at once."""
    return np.frombuffer(memoryview(structures), dtype=np.dtype(structures._type_))


def _bytes(size: _Size, is_A: bool, item_bytes: int) -> int:
    rank, inputs, outputs = size
    numbers = inputs if is_A else _multiple(outputs, TILE_OUTPUTS)
    return _aligned(_multiple(rank, RANK_MULTIPLE) * numbers * item_bytes)


def _size(factors: Factors) -> _Size:
    rank, inputs = factors.A.shape
    return rank, inputs, factors.B.shape[0]


def _ready(factor: Float[Tensor, "_rows _columns"]) -> Float[Tensor, "_rows _columns"]:
    return factor.float().contiguous()


def _aligned(number: int) -> int:
    return _multiple(number, LINE_BYTES)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
