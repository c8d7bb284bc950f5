"""The training step's kernels on a GPU: with which grid and tiles each runs.

Given fake tensors (a plan), the calls make all they would make, and run nothing.
"""

import functools
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.native.building import are_wanted
from loralab.native.pairs import Mask, OtherRows, Pair, Rows, stacked

log = logging.getLogger("loralab")

MOST_COLUMNS = 1 << 15
"""Of rows, which one program norms or rotates whole."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPLIT_PROGRAMS = 128
"""About how many programs sum up rows, so that the largest GPUs have work for all."""
_ROWS, _COLUMNS, _MOST_RANKS = 32, 128, 64
"""Of tiles."""
_FLAT = 1024
_SOURCES = (Path(__file__), Path(__file__).with_name("gpu_kernels.py"))
"""What decides the kernels' bits beside Triton: their arithmetic, tiles and splits."""


def covers(rows: Sequence[Tensor]) -> bool:
    """Whether the kernels compute with these rows, which have one dtype and are contiguous."""
    first = rows[0]
    if first.dtype not in _DTYPES or any(each.shape[-1] > MOST_COLUMNS for each in rows):
        return False
    if isinstance(first, FakeTensor):
        return are_wanted()
    return is_usable(first.device, first.dtype)


def build_name() -> str:
    """Which kernels run, by Triton's version and their hash; "none" where there are none."""
    kernels = load_kernels()
    if kernels is None:
        return "none"
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()
    return f"triton-{kernels.triton.__version__}-{digest[:16]}"


@functools.cache
def load_kernels() -> Any:
    """The module of kernels; None where they are not wanted or there is no Triton (logged once)."""
    if not are_wanted():
        return None
    try:
        from loralab.native import gpu_kernels
    except ImportError as error:
        log.warning("training runs on torch's operations: no Triton (%s)", error)
        return None
    return gpu_kernels


@functools.cache
def is_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on the device and agree with torch's operations there (logged once
    where not). On a CPU they do where Triton interprets them."""
    kernels = load_kernels()
    if kernels is None or not (_has_tensor_cores(device) or kernels.INTERPRETED):
        return False
    from loralab.native.gpu_trial import try_out  # calls these functions

    try:
        try_out(device, dtype)
    except Exception as error:  # compilers and drivers raise what they like
        log.warning("training in %s runs on torch's operations: %s", dtype, error)
        return False
    return True


def add_pairs(
    x: Rows, As: Sequence[Float[Tensor, "_ in"]], pairs: Sequence[Pair], mask: Mask | None
) -> None:
    """To the rows of each pair `s B A (m * x)`, in place."""
    hidden = _contracted(x, stacked(As), mask)
    for pair, h in zip(pairs, hidden.split([A.shape[0] for A in As], dim=1), strict=True):
        _expand(h, pair.B.mT, pair.rows, scale=pair.scale, added=True)


def pairs_backward(
    x: Rows,
    As: Sequence[Float[Tensor, "_ in"]],
    pairs: Sequence[Pair],
    mask: Mask | None,
    grad_x: Rows | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of every A and every B; that of `x` through the pairs goes to `grad_x`."""
    A, ranks = stacked(As), [A.shape[0] for A in As]
    hidden = _contracted(x, A, mask)
    grad_hidden = torch.empty_like(hidden)
    sizes = [A.numel(), *(pair.B.numel() for pair in pairs)]
    sums = x.new_empty(_num_splits(x, pairs), sum(sizes), dtype=torch.float32)
    of_A, *of_Bs = sums.split(sizes, dim=1)
    columns = zip(hidden.split(ranks, dim=1), grad_hidden.split(ranks, dim=1), strict=True)
    for pair, of_B, (h, grad_h) in zip(pairs, of_Bs, columns, strict=True):
        _contract(pair.rows, pair.B.mT, grad_h, scale=pair.scale)
        _outer(h, pair.rows, of_B, scale=pair.scale, transposed=True)
    _outer(grad_hidden, x, of_A, mask)
    if grad_x is not None:
        _expand(grad_hidden, A, grad_x, mask)
    grad_A, *grad_Bs = sums.sum(0).split(sizes)
    return (
        list(grad_A.view(A.shape).split(ranks)),
        [grad.view(pair.B.shape) for grad, pair in zip(grad_Bs, pairs, strict=True)],
    )


def norm(x: Rows, gain: Float[Tensor, " width"], epsilon: float) -> tuple[Rows, Tensor]:
    """`gain * x / sqrt(mean(x^2) + epsilon)`, and the reciprocal of each row's root (fp32)."""
    n, inverse = torch.empty_like(x), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    grid, tile = _whole_rows(x)
    _run("norm", grid, x, gain, n, inverse, *x.shape, float(epsilon), **tile)
    return n, inverse


def norm_backward(
    g: Rows, x: Rows, inverse: Tensor, gain: Float[Tensor, " width"], beside: Rows | None
) -> Rows:
    """The gradient of the norm's input, plus `beside`."""
    grad_x = torch.empty_like(x)
    grid, tile = _whole_rows(x)
    has_beside = beside is not None
    given = (g, x, inverse, gain, beside if has_beside else x, grad_x)
    _run("norm_backward", grid, *given, *x.shape, HAS_BESIDE=has_beside, **tile)
    return grad_x


def gated(gate: Rows, up: Rows, activation: int) -> Rows:
    """`act(gate) * up`; activation: its number in `ACTIVATIONS`."""
    out = torch.empty_like(gate)
    count = gate.numel()
    grid = (_ceil(count, _FLAT),)
    _run("gated", grid, gate, up, out, count, ACTIVATION=activation, BLOCK=_FLAT)
    return out


def gated_backward(g: Rows, gate: Rows, up: Rows, activation: int) -> tuple[Rows, Rows]:
    """The gradients of gate (in the memory of `g`) and up."""
    grad_up = torch.empty_like(up)
    count = g.numel()
    grid, given = (_ceil(count, _FLAT),), (g, gate, up, g, grad_up, count)
    _run("gated_backward", grid, *given, ACTIVATION=activation, BLOCK=_FLAT)
    return g, grad_up


def rotated(
    rows: Rows,
    cos: Float[Tensor, "_ tokens size"],
    sin: Float[Tensor, "_ tokens size"],
    *,
    back: bool,
) -> OtherRows:
    """Rotary positions turned into rows of heads; `back` transposes it."""
    out = torch.empty_like(rows)
    width, size = rows.shape[1], cos.shape[-1]
    given = (rows, cos, sin, out, width, cos.numel() // size)
    _run("rotated", (len(rows),), *given, BACK=back, SIZE=size, COLUMNS=_power(width))
    return out


def _contracted(x: Rows, F: Tensor, mask: Mask | None) -> Float[Tensor, "rows ranks"]:
    out = x.new_empty(x.shape[0], F.shape[0])
    _contract(x, F, out, mask)
    return out


def _contract(
    x: Rows, F: Tensor, out: Tensor, mask: Mask | None = None, *, scale: float | int = 1
) -> None:
    """`out = s (m * x) F'`."""
    num_ranks = F.shape[0]
    tile = _tile(x.dtype, num_ranks)
    grid = (_ceil(x.shape[0], tile["ROWS"]), _ceil(num_ranks, tile["RANKS"]))
    sizes = (*x.shape, num_ranks, *F.stride(), out.stride(0), float(scale))
    _run("contract", grid, x, F, out, *_given(mask, x), *sizes, MASKED=mask is not None, **tile)


def _outer(
    a: Tensor,
    x: Rows,
    sums: Float[Tensor, "splits numbers"],
    mask: Mask | None = None,
    *,
    scale: float | int = 1,
    transposed: bool = False,
) -> None:
    """`s a' (m * x)` of each split of the rows to a row of `sums`, or its transpose."""
    num_rows, num_columns = x.shape
    num_ranks, splits = a.shape[1], sums.shape[0]
    tile = _tile(x.dtype, num_ranks)
    rows_per_split = _ceil(_ceil(num_rows, splits), tile["ROWS"]) * tile["ROWS"]
    strides = (1, num_ranks) if transposed else (num_columns, 1)
    sizes = (*x.shape, num_ranks, a.stride(0), sums.stride(0), *strides, float(scale))
    grid = (_ceil(num_columns, tile["COLUMNS"]), _ceil(num_ranks, tile["RANKS"]), splits)
    masked = mask is not None
    _run("outer", grid, a, x, sums, *_given(mask, x), *sizes, rows_per_split, MASKED=masked, **tile)


def _num_splits(x: Rows, pairs: Sequence[Pair]) -> int:
    """Into how many splits rows are summed up: more where few tiles leave processors idle."""
    columns = min(x.shape[1], max(pair.rows.shape[1] for pair in pairs))
    ranks = sum(pair.B.shape[1] for pair in pairs)
    tiles = _ceil(columns, _COLUMNS) * _ceil(ranks, _MOST_RANKS)
    return min(_ceil(_SPLIT_PROGRAMS, tiles), max(1, _ceil(x.shape[0], _ROWS)))


def _expand(
    a: Tensor,
    F: Tensor,
    y: Rows,
    mask: Mask | None = None,
    *,
    scale: float | int = 1,
    added: bool = False,
) -> None:
    """`y = s m * (a F)`, or that added to y."""
    num_ranks = F.shape[0]
    tile = _tile(y.dtype, num_ranks, rows=2 * _ROWS)
    grid = (_ceil(y.shape[0], tile["ROWS"]), _ceil(y.shape[1], tile["COLUMNS"]))
    sizes = (*y.shape, num_ranks, a.stride(0), *F.stride(), float(scale))
    switches = {"ADDED": added, "MASKED": mask is not None}
    _run("expand", grid, a, F, y, *_given(mask, y), *sizes, **switches, **tile, num_stages=1)


@functools.cache
def _tile(dtype: torch.dtype, num_ranks: int, *, rows: int = _ROWS) -> Mapping[str, Any]:
    """Tiles whose sides are powers of two, 16 at least; fp32 takes half the columns."""
    is_wide = dtype == torch.float32
    kernels = load_kernels()
    return {
        "ROWS": rows,
        "COLUMNS": _COLUMNS // 2 if is_wide else _COLUMNS,
        "RANKS": max(16, min(_MOST_RANKS, _power(num_ranks))),
        "DOT": None if kernels is None else kernels.dot_type(dtype),
        "num_warps": 8 if is_wide else 4,
    }


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether it has those that Triton makes use of; on GPUs before them the kernels are slow."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _whole_rows(x: Rows) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and tile of programs that hold whole rows: several of them where they are short."""
    columns = _power(x.shape[1])
    rows = max(1, 2048 // columns)
    warps = min(16, max(4, columns // 512))
    return (_ceil(len(x), rows),), {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def _given(mask: Mask | None, x: Rows) -> tuple[Tensor, Tensor]:
    """The mask's flips and places; anything where there is none, which the kernel never reads."""
    return (x, x) if mask is None else (mask.flips, mask.places)


def _run(kernel: str, grid: tuple[int, ...], x: Tensor, *given: Any, **constants: Any) -> None:
    if isinstance(x, FakeTensor) or not math.prod(grid):
        return
    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        getattr(load_kernels(), kernel)[grid](x, *given, **constants)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
