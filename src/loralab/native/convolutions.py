"""Calls into the kernel for convolutions whose pair is in the convolution's own kernel.

Then the base's convolution and the gradient of its input do the work of both. The gradients of the
factors are left: two thin convolutions, which libraries made for wide ones do at a fraction
of their speed.
"""

import ctypes
import threading
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.native.building import load_kernel
from loralab.native.on_cpu import KERNEL
from loralab.placement import device_kind

_MOST_KEPT = 1 << 20  # numbers
_kept = threading.local()

_SIZES = ("batch", "channels", "height", "width", "out", "out_height", "out_width", "rank")
_GEOMETRY = ("kernel", "stride", "padding", "dilation")


class _Convolution(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in _SIZES),
        *((f"{name}_{axis}", c_int64) for name in _GEOMETRY for axis in "yx"),
        ("num_threads", c_int64),
        ("scale", c_float),
        *((name, c_void_p) for name in ("x", "g", "A", "B", "grad_A", "grad_B")),
    )


def covers(x: Tensor, *factors: Tensor) -> bool:
    """Whether the kernel computes with this input and these factors: fp32 on the CPU, of one or two
    dimensions beside rows and channels; and there is a kernel."""
    return (
        x.dtype == torch.float32
        and x.ndim <= 4
        and device_kind(x) == "cpu" == x.device.type
        and all(factor.dtype == torch.float32 for factor in factors)
        and not torch.compiler.is_compiling()
        and load_kernel(KERNEL) is not None
    )


def pair_gradients(
    x: Float[Tensor, "batch channels *places"],
    g: Float[Tensor, "batch out *_"],
    A: Float[Tensor, "rank columns"],
    B: Float[Tensor, "out rank"],
    *,
    scale: float,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "out rank"]]:
    """The gradients of A and B in `y = s B (A * x)`; g: that of y."""
    x, g, A, B = (each.contiguous() for each in (x, g, A, B))
    grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
    if isinstance(x, FakeTensor):
        return grad_A, grad_B
    library = load_kernel(KERNEL)
    assert library is not None, "`covers` says so beforehand"
    step = _Convolution(
        *(x.shape[0], x.shape[1], *_plane(x.shape[2:], 1)),
        *(g.shape[1], *_plane(g.shape[2:], 1), len(A)),
        *_plane(kernel, 1),
        *_plane(stride, 1),
        *_plane(padding, 0),
        *_plane(dilation, 1),
        torch.get_num_threads(),
        scale,
        *(each.data_ptr() for each in (x, g, A, B, grad_A, grad_B)),
    )
    library.pair_gradients_fp32(ctypes.byref(step))
    return grad_A, grad_B


def merged(
    weight: Float[Tensor, "out channels *kernel"],
    A: Float[Tensor, "rank columns"],
    B: Float[Tensor, "out rank"],
    scale: float,
) -> Float[Tensor, "out channels *kernel"]:
    """`W + s B A`, the kernel that does the work of both.

    It may lie in memory that the thread's next call takes again: fresh pages would cost more than
    the sum.
    """
    own = [each.contiguous() for each in (weight, A, B)]
    if isinstance(own[0], FakeTensor):
        return torch.empty_like(own[0])
    kernel = _room(own[0])
    library = load_kernel(KERNEL)
    assert library is not None, "`covers` says so beforehand"
    sizes = c_int64(len(B)), c_int64(A.shape[1]), c_int64(len(A)), c_float(scale)
    threads = c_int64(torch.get_num_threads())
    pointers = (c_void_p(each.data_ptr()) for each in (*own, kernel))
    library.merge_pair_fp32(*sizes, threads, *pointers)
    return kernel


def _room(like: Tensor) -> Tensor:
    """Memory for such a tensor, the thread's own where that is not much."""
    count = like.numel()
    if count > _MOST_KEPT:
        return torch.empty_like(like)
    kept: Tensor | None = getattr(_kept, "room", None)
    if kept is None or kept.numel() < count:
        kept = _kept.room = torch.empty(count, dtype=torch.float32)
    return kept[:count].view(like.shape)


def _plane(sizes: Sequence[int], missing: int) -> tuple[int, int]:
    """Sizes as (height, width), where a single dimension is a width."""
    return (missing, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])
