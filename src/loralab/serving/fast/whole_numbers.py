"""The base's weights as int8: half the bytes of 16 bit, and those are what a token waits for.

    weight[n][k]  is taken as  rows[n] * values[n][k] * columns[k]

A row's scale alone is decided by its largest number. So columns are first brought half way to the
size at which they were all equal beside equal rows (Sinkhorn's normalisation; SINQ, 2509.22944):
no data are needed, and inputs take the columns' scales along when they are rounded to 16 bit. Half,
since what is won in rows is lost in large columns. Pairs stay as they are.
"""

import mmap
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

Precision = Literal["base", "int8"]
"""In which decoding reads the base's weights: as they are, or as int8."""

LARGEST = 127
_TURNS, _LINE_BYTES = 3, 64
_LEAST = 1e-12  # of a scale: rows and columns of zeros have one too


class Whole(NamedTuple):
    """A weight in whole numbers with its scales."""

    values: Int8[Tensor, "_out _in"]
    rows: Float[Tensor, " _out"]
    columns: Float[Tensor, " _in"]

    def weight(self) -> Float[Tensor, "_out _in"]:
        """What they stand for, fp32."""
        return self.rows[:, None] * self.values * self.columns


@torch.no_grad()
def whole_numbers(
    weights: Sequence[Float[Tensor, "_out in"]], values: Sequence[Int8[Tensor, "_out in"]]
) -> list[Whole]:
    """Weights that read one input in whole numbers, written to `values`.

    They share the scales of columns.
    """
    columns = _column_scales(torch.cat([weight.float() for weight in weights]))
    return [
        _rounded(weight.float() / columns, columns, to)
        for weight, to in zip(weights, values, strict=True)
    ]


def _column_scales(weight: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    """What columns are divided by; overwrites the weight."""
    squares, columns = weight.square_(), weight.new_ones(weight.shape[1])  # means of squares
    for _ in range(_TURNS):
        rows = (squares @ columns.reciprocal() / squares.shape[1]).clamp_min(_LEAST**2)
        columns = (rows.reciprocal() @ squares / squares.shape[0]).clamp_min(_LEAST**2)
    return columns.pow_(0.25)


def _rounded(
    evened: Float[Tensor, "out in"], columns: Float[Tensor, " in"], values: Int8[Tensor, "out in"]
) -> Whole:
    rows = (evened.abs().amax(1) / LARGEST).clamp_min(_LEAST)
    values.copy_(evened.div_(rows[:, None]).round_())
    return Whole(values, rows, columns)


class WholeCopies:
    """int8 copies of groups of weights, made once for the tensors that came first.

    While other tensors have their place (a merged adapter), theirs are made anew each time.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[int, ...], list[Whole]] = {}

    def of(self, groups: Sequence[Sequence[Float[Tensor, "_out _in"]]]) -> list[list[Whole]]:
        """A copy of each weight, group by group. Weights of a group read one input."""
        keys = [tuple(weight.data_ptr() for weight in group) for group in groups]
        missing = [g for key, g in zip(keys, groups, strict=True) if key not in self._first]
        memory = iter(_memory_for([weight for group in missing for weight in group]))
        made = iter([whole_numbers(group, [next(memory) for _ in group]) for group in missing])
        found = [self._first[key] if key in self._first else next(made) for key in keys]
        if not self._first:
            self._first = dict(zip(keys, found, strict=True))
        return found


def _memory_for(weights: Sequence[Tensor]) -> list[Int8[Tensor, "_out _in"]]:
    """A place for each, all in one memory: it is read from end to end."""
    sizes = [-(-weight.numel() // _LINE_BYTES) * _LINE_BYTES for weight in weights]
    pieces = _large_pages(sum(sizes)).split(sizes)
    return [p[: w.numel()].view(w.shape) for p, w in zip(pieces, weights, strict=True)]


def _large_pages(num_bytes: int) -> Int8[Tensor, " num_bytes"]:
    """Memory of large pages where the system has them: a request by itself gains a tenth."""
    if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.int8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int8)
