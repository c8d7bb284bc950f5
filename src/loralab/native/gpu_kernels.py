"""The training step's kernels for GPUs, in Triton; `on_gpu` calls them.

Beside large matrix products a step moves much memory and computes little. So every row is read and
written once, and all arithmetic is fp32. Low-rank pairs are three thin products:

    contract   out[t, r] = s sum_c (m * x)[t, c] F[r, c]       A x, and B' g
    outer      out[r, c] = s sum_t a[t, r] (m * x)[t, c]       the gradients of A and B
    expand     y[t, c]  += s m[t, c] sum_r a[t, r] F[r, c]     B h, and A' h

Factors F are read where they lie, in fp32 and by strides: none is copied or transposed first. The
mask m is a window into the table of coin flips from each row's place on (`adapters.noise`). Sums
have a fixed order, so that equal inputs give equal bits.
"""

from typing import no_type_check  # Triton's types are not Python's

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Whether Triton runs these functions in Python, on a CPU, for tests."""


kernel = triton.jit(
    do_not_specialize=["num_rows", "angle_rows"], do_not_specialize_on_alignment=["places"]
)
"""Compiled once, however many rows a batch has and wherever an adapter's begin in it."""


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """In which type tiles are multiplied: the rows' own; the interpreter knows no bf16."""
    known = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return tl.float32 if INTERPRETED else known.get(dtype, tl.float32)


@kernel
@no_type_check
def contract(
    x, F, out, flips, places, num_rows, num_columns, num_ranks, F_rank, F_column, out_row, scale,
    MASKED: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = _rows_tile(
            x, flips, places, rows, columns, num_rows, num_columns, MASKED=MASKED, DOT=DOT
        )
        factor = _factor_tile(F, ranks, columns, num_ranks, num_columns, F_rank, F_column, DOT=DOT)
        total = tl.dot(values, tl.trans(factor), total, input_precision="ieee")
    inside = (rows < num_rows)[:, None] & (ranks < num_ranks)[None, :]
    at = rows.to(tl.int64)[:, None] * out_row + ranks[None, :]
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=inside)


@kernel
@no_type_check
def outer(
    a, x, out, flips, places, num_rows, num_columns, num_ranks, a_row, out_split, out_rank,
    out_column, scale, rows_per_split,
    MASKED: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    split = tl.program_id(2)
    first = split * rows_per_split
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for start in range(first, min(first + rows_per_split, num_rows), ROWS):
        rows = start + tl.arange(0, ROWS)
        values = _rows_tile(
            x, flips, places, rows, columns, num_rows, num_columns, MASKED=MASKED, DOT=DOT
        )
        thin = _thin_tile(a, rows, ranks, num_rows, num_ranks, a_row, DOT=DOT)
        total = tl.dot(tl.trans(thin), values, total, input_precision="ieee")
    inside = (ranks < num_ranks)[:, None] & (columns < num_columns)[None, :]
    at = split.to(tl.int64) * out_split + ranks[:, None] * out_rank + columns[None, :] * out_column
    tl.store(out + at, total * scale, mask=inside)


@kernel
@no_type_check
def expand(
    a, F, y, flips, places, num_rows, num_columns, num_ranks, a_row, F_rank, F_column, scale,
    ADDED: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_ranks, RANKS):
        ranks = start + tl.arange(0, RANKS)
        thin = _thin_tile(a, rows, ranks, num_rows, num_ranks, a_row, DOT=DOT)
        factor = _factor_tile(F, ranks, columns, num_ranks, num_columns, F_rank, F_column, DOT=DOT)
        total = tl.dot(thin, factor, total, input_precision="ieee")
    total *= scale
    if MASKED:
        total = tl.where(_kept(flips, places, rows, columns, num_rows, num_columns), total, 0.0)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = y + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    if ADDED:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@kernel
@no_type_check
def norm(
    x, gain, n, inverse, num_rows, num_columns, epsilon,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, at = _whole_rows(num_rows, num_columns, ROWS, COLUMNS)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gains = tl.load(gain + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, 1) / num_columns + epsilon)
    normed = (values * root[:, None]).to(n.dtype.element_ty).to(tl.float32)
    tl.store(n + at, (normed * gains[None, :]).to(n.dtype.element_ty), mask=inside)
    tl.store(inverse + rows, root, mask=rows < num_rows)


@kernel
@no_type_check
def norm_backward(
    g, x, inverse, gain, beside, grad_x, num_rows, num_columns,
    HAS_BESIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, at = _whole_rows(num_rows, num_columns, ROWS, COLUMNS)
    gains = tl.load(gain + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    root = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)[:, None]
    normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * root
    scaled = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * gains[None, :]
    along = tl.sum(scaled * normed, 1) / num_columns
    total = (scaled - normed * along[:, None]) * root
    if HAS_BESIDE:
        total += tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=inside)


@kernel
@no_type_check
def gated(gate, up, out, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    values = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    activated, _ = _activated(values, ACTIVATION)
    tl.store(out + at, (activated * others).to(out.dtype.element_ty), mask=inside)


@kernel
@no_type_check
def gated_backward(
    g, gate, up, grad_gate, grad_up, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activated(values, ACTIVATION)
    dtype = grad_gate.dtype.element_ty
    tl.store(grad_gate + at, (gradient * others * slope).to(dtype), mask=inside)
    tl.store(grad_up + at, (gradient * activated).to(dtype), mask=inside)


@kernel
@no_type_check
def rotated(
    x, cos, sin, out, num_columns, angle_rows, BACK: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < num_columns
    place = columns % SIZE
    is_first = place < SIZE // 2
    beside = tl.where(is_first, SIZE // 2, -(SIZE // 2))  # the way to the other of each two
    angles = (row % angle_rows) * SIZE + place
    values = tl.load(x + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(x + row * num_columns + columns + beside, mask=inside, other=0.0)
    cosine = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sine = tl.load(sin + angles + beside, mask=inside, other=0.0).to(tl.float32)
        sine = tl.where(is_first, sine, -sine)
    else:
        sine = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        sine = tl.where(is_first, -sine, sine)
    total = values * cosine + others.to(tl.float32) * sine
    tl.store(out + row * num_columns + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _rows_tile(
    x, flips, places, rows, columns, num_rows, num_columns,
    MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(m * x) at these rows and columns, 0 outside."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(DOT)
    if MASKED:
        kept = _kept(flips, places, rows, columns, num_rows, num_columns)
        values = tl.where(kept, values, 0.0)
    return values


@triton.jit
@no_type_check
def _kept(flips, places, rows, columns, num_rows, num_columns):
    place = tl.load(places + rows, mask=rows < num_rows, other=0)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(flips + place[:, None] + columns[None, :], mask=inside, other=0) != 0


@triton.jit
@no_type_check
def _thin_tile(a, rows, ranks, num_rows, num_ranks, a_row, DOT: tl.constexpr):
    """a at these rows and ranks, 0 outside."""
    inside = (rows < num_rows)[:, None] & (ranks < num_ranks)[None, :]
    at = rows.to(tl.int64)[:, None] * a_row + ranks[None, :]
    return tl.load(a + at, mask=inside, other=0.0).to(DOT)


@triton.jit
@no_type_check
def _factor_tile(
    F, ranks, columns, num_ranks, num_columns, F_rank, F_column, DOT: tl.constexpr
):  # fmt: skip
    """F at these ranks and columns, 0 outside."""
    inside = (ranks < num_ranks)[:, None] & (columns < num_columns)[None, :]
    at = ranks[:, None] * F_rank + columns[None, :] * F_column
    return tl.load(F + at, mask=inside, other=0.0).to(DOT)


@triton.jit
@no_type_check
def _whole_rows(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return rows, columns, inside, rows.to(tl.int64)[:, None] * num_columns + columns[None, :]


@triton.jit
@no_type_check
def _activated(x, ACTIVATION: tl.constexpr):
    """The activation's value and slope; the numbers are those of `ACTIVATIONS`."""
    if ACTIVATION == 0:  # silu
        open_ = tl.sigmoid(x)
        return x * open_, open_ * (1 + x * (1 - open_))
    elif ACTIVATION == 1:  # gelu
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # gelu_tanh
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        bend = 2 * tl.sigmoid(2 * inner) - 1  # tanh
        slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        return 0.5 * x * (1 + bend), 0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * slope
