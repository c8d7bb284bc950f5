"""The training step's kernel on a CPU: C++ that is compiled at first use, called through ctypes.

Given fake tensors (a plan), the calls make their outputs and run nothing.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.native.building import Kernel, load_kernel
from loralab.native.pairs import Mask, OtherRows, Pair, Rows, stacked

KERNEL = Kernel("training", Path(__file__).with_name("kernel"), ("-fopenmp",))

COLUMNS = 16
"""Widths are multiples of it."""
MOST_PAIRS = 8
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def build_name() -> str:
    """Which build of the kernel runs, by its hash; "none" where torch's operations stand in."""
    library = load_kernel(KERNEL)
    return "none" if library is None else Path(library._name).stem


def covers(rows: Sequence[Tensor]) -> bool:
    """Whether the kernel computes with these rows, which have one dtype and are contiguous."""
    first = rows[0]
    fits = first.dtype in _SUFFIX and all(each.shape[-1] % COLUMNS == 0 for each in rows)
    return fits and first.device.type == "cpu" and load_kernel(KERNEL) is not None


def add_pairs(
    x: Rows, As: Sequence[Float[Tensor, "_ in"]], pairs: Sequence[Pair], mask: Mask | None
) -> None:
    """To the rows of each pair `s B A (m * x)`, in place; sums are fp32."""
    A = stacked(As)
    if not isinstance(x, FakeTensor):
        _call("low_rank_forward", x.dtype, ctypes.byref(_low_rank(x, A, pairs, mask)))


def pairs_backward(
    x: Rows,
    As: Sequence[Float[Tensor, "_ in"]],
    pairs: Sequence[Pair],
    mask: Mask | None,
    grad_x: Rows | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of every A and every B; that of `x` through the pairs goes to `grad_x`."""
    A = stacked(As)
    grad_A = torch.empty_like(A)
    grad_Bs = [torch.empty_like(pair.B) for pair in pairs]
    if not isinstance(x, FakeTensor):
        step = _low_rank(x, A, pairs, mask)
        step.grad_x, step.grad_A = _pointer(grad_x), grad_A.data_ptr()
        for entry, grad_B in zip(step.pairs, grad_Bs, strict=False):
            entry.grad_B = grad_B.data_ptr()
        _call("low_rank_backward", x.dtype, ctypes.byref(step))
    return list(grad_A.split([len(each) for each in As])), grad_Bs


def norm(x: Rows, gain: Float[Tensor, " width"], epsilon: float) -> tuple[Rows, Tensor]:
    """`gain * x / sqrt(mean(x^2) + epsilon)`, and the reciprocal of each row's root (fp32)."""
    n, inverse = torch.empty_like(x), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if not isinstance(x, FakeTensor):
        sizes = c_int64(len(x)), c_int64(x.shape[1]), c_float(epsilon), c_int64(_threads())
        _call("norm_forward", x.dtype, *sizes, *_pointers(x, gain, n, inverse))
    return n, inverse


def norm_backward(
    g: Rows, x: Rows, inverse: Tensor, gain: Float[Tensor, " width"], beside: Rows | None
) -> Rows:
    """The gradient of the norm's input, plus `beside`."""
    grad_x = torch.empty_like(x)
    if not isinstance(x, FakeTensor):
        sizes = c_int64(len(x)), c_int64(x.shape[1]), c_int64(_threads())
        _call("norm_backward", x.dtype, *sizes, *_pointers(g, x, inverse, gain, beside, grad_x))
    return grad_x


def gated(gate: Rows, up: Rows, activation: int) -> Rows:
    """`act(gate) * up`; activation: its number in `ACTIVATIONS`."""
    rows = torch.empty_like(gate)
    if not isinstance(gate, FakeTensor):
        sizes = c_int64(gate.numel()), c_int64(activation), c_int64(_threads())
        _call("gated_forward", gate.dtype, *sizes, *_pointers(gate, up, rows))
    return rows


def gated_backward(g: Rows, gate: Rows, up: Rows, activation: int) -> tuple[Rows, Rows]:
    """The gradients of gate (in the memory of `g`) and up."""
    grad_up = torch.empty_like(up)
    if not isinstance(g, FakeTensor):
        sizes = c_int64(gate.numel()), c_int64(activation), c_int64(_threads())
        _call("gated_backward", gate.dtype, *sizes, *_pointers(g, gate, up, g, grad_up))
    return g, grad_up


@dataclass(frozen=True)
class Attention:
    """Attention of a batch, from the projections' rows.

    q: (batch * tokens, heads * size); k and v: (batch * tokens, groups * size). cos, sin: of the
    rotary positions. mask: True (or 0) where a query may look; None: at what is not behind it.
    wanted: the positions of the queries; None for every token.
    """

    q: Rows
    k: Rows
    v: Rows
    cos: Float[Tensor, "_ tokens size"]
    sin: Float[Tensor, "_ tokens size"]
    mask: Bool[Tensor, "_ 1 _ tokens"] | Float[Tensor, "_ 1 _ tokens"] | None
    wanted: Int[Tensor, "batch wanted"] | None

    @property
    def batch(self) -> int:
        """How many rows of tokens."""
        return len(self.q) // self.cos.shape[1]

    @property
    def num_wanted(self) -> int:
        """How many queries a row of tokens has."""
        return self.cos.shape[1] if self.wanted is None else self.wanted.shape[1]

    def is_covered(self) -> bool:
        """Whether the kernel computes it, of rows that it covers."""
        size, mask = self.cos.shape[-1], self.mask
        return (
            size % (2 * COLUMNS) == 0
            and (mask is None or mask.dtype in (torch.bool, self.q.dtype))
            and (self.wanted is None or self.wanted.is_contiguous())
        )

    def forward(self) -> OtherRows:
        """What the output layer reads: (batch * wanted, heads * size)."""
        out = self.q.new_empty(self.batch * self.num_wanted, self.q.shape[1])
        if not isinstance(self.q, FakeTensor):
            step = self._step()
            step.out = out.data_ptr()
            _call("attention_forward", self.q.dtype, ctypes.byref(step))
        return out

    def backward(self, g: OtherRows) -> tuple[Rows, Rows, Rows]:
        """The gradients of q, k and v."""
        gradients = torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.v)
        if not isinstance(self.q, FakeTensor):
            step = self._step()
            step.g = g.data_ptr()
            step.grad_q, step.grad_k, step.grad_v = (each.data_ptr() for each in gradients)
            _call("attention_backward", self.q.dtype, ctypes.byref(step))
        return gradients

    def _step(self) -> "_Attention":
        tokens, size = self.cos.shape[1:]
        mask, shared = self.mask, self.cos.shape[0] == 1
        strides = () if mask is None else _strides(mask)
        return _Attention(
            self.batch,
            tokens,
            self.q.shape[1] // size,
            self.k.shape[1] // size,
            size,
            self.num_wanted,
            _threads(),
            size**-0.5,
            *(each.data_ptr() for each in (self.q, self.k, self.v, self.cos, self.sin)),
            0 if shared else tokens * size,
            _pointer(mask),
            mask is not None and mask.dtype != torch.bool,
            *(strides or (0, 0, 0)),
            _pointer(self.wanted),
        )


def _strides(mask: Tensor) -> tuple[int, int, int]:
    """From one row, query and key to the next; 0 where all have the same."""
    steps = [step if size > 1 else 0 for size, step in zip(mask.shape, mask.stride(), strict=True)]
    return steps[0], steps[2], mask.stride(3)


class _Pair(ctypes.Structure):
    _fields_ = (
        ("B", c_void_p),
        ("out", c_int64),
        ("rank", c_int64),
        ("start", c_int64),
        ("scale", c_float),
        ("rows", c_void_p),
        ("grad_B", c_void_p),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "in", "ranks", "num_pairs", "num_threads")),
        *((name, c_void_p) for name in ("x", "A", "flips", "places", "grad_x", "grad_A")),
        ("pairs", _Pair * MOST_PAIRS),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((n, c_int64) for n in ("batch", "tokens", "heads", "groups", "size", "num_wanted")),
        ("num_threads", c_int64),
        ("scale", c_float),
        *((name, c_void_p) for name in ("q", "k", "v", "cos", "sin")),
        ("angles_row", c_int64),
        ("mask", c_void_p),
        *((n, c_int64) for n in ("mask_is_added", "mask_row", "mask_query", "mask_key")),
        *((n, c_void_p) for n in ("wanted", "out", "g", "grad_q", "grad_k", "grad_v")),
    )


def _low_rank(x: Rows, A: Tensor, pairs: Sequence[Pair], mask: Mask | None) -> _LowRank:
    step = _LowRank(len(x), x.shape[1], len(A), len(pairs), _threads(), x.data_ptr(), A.data_ptr())
    if mask is not None:
        step.flips, step.places = mask.flips.data_ptr(), mask.places.data_ptr()
    start = 0
    for entry, pair in zip(step.pairs, pairs, strict=False):
        entry.B, entry.rows, entry.scale = pair.B.data_ptr(), pair.rows.data_ptr(), pair.scale
        (entry.out, entry.rank), entry.start = pair.B.shape, start
        start += entry.rank
    return step


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()


def _pointers(*tensors: Tensor | None) -> tuple[c_void_p, ...]:
    return tuple(c_void_p(_pointer(tensor)) for tensor in tensors)


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    library = load_kernel(KERNEL)
    assert library is not None, "`covers` says so beforehand"
    getattr(library, f"{name}_{_SUFFIX[dtype]}")(*arguments)
