"""The kernels of a GPU tried out against torch's operations, before a training relies on them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks

from loralab.native import on_gpu
from loralab.native.pairs import ACTIVATION_FUNCTIONS, Mask, Pair

_TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative errors (2-norms) that rounding can cause."""

_ROWS, _WIDTH, _OUT = 72, 96, 160

_RANKS = {8: True, 64: False}
"""Of the smallest tiles and of the largest, which a GPU may have no room for; whether masked."""

Trial = Iterator[tuple[str, Sequence[Tensor], Sequence[Tensor]]]
"""What was tried, what the kernel gave, and what torch gives in float64."""


class WrongKernelError(Exception):
    """A kernel gives something else than torch's operations."""


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Runs every kernel on random numbers. Raises `WrongKernelError`, and what compilers raise."""
    source = Generator(device).manual_seed(0)
    with _undisturbed():
        for trial in (_pairs, _norm, _gates, _rotation):
            for name, got, wanted in trial(source, dtype):
                for each, right in zip(got, wanted, strict=True):
                    error = (each.double() - right).norm()
                    if not error <= _TOLERANCES[dtype] * right.norm():
                        raise WrongKernelError(f"the kernel {name} gives wrong numbers on {device}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, gradients are had wherever the first rows came from: a validation, a plan, a
    checkpointed forward, which would count what autograd keeps here as its own."""
    with ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(saved_tensors_hooks(lambda kept: kept, lambda kept: kept))
        yield


def _pairs(source: Generator, dtype: torch.dtype) -> Trial:
    flips = torch.randint(2, (4 * _WIDTH,), generator=source, device=source.device).to(torch.uint8)
    places = torch.randint(3 * _WIDTH, (_ROWS,), generator=source, device=source.device)
    for rank, is_masked in _RANKS.items():
        x, y, g = (_drawn(source, dtype, _ROWS, width) for width in (_WIDTH, _OUT, _OUT))
        A, B = (_drawn(source, torch.float32, *size) for size in ((rank, _WIDTH), (_OUT, rank)))
        mask = Mask(flips, places) if is_masked else None
        kept = flips.unfold(0, _WIDTH, 1)[places].double() if is_masked else 1
        added, gradients = _with_gradients(
            lambda x, A, B, kept=kept: 0.5 * (kept * x) @ A.mT @ B.mT, g, x, A, B
        )
        wanted = y.double() + added
        on_gpu.add_pairs(x, [A], [Pair(B, 0.5, y)], mask)
        yield "add_pairs", [y], [wanted]
        grad_x = torch.empty_like(x)
        found = on_gpu.pairs_backward(x, [A], [Pair(B, 0.5, g)], mask, grad_x)
        yield "pairs_backward", [grad_x, *found[0], *found[1]], gradients


def _norm(source: Generator, dtype: torch.dtype) -> Trial:
    x, g, beside = (_drawn(source, dtype, _ROWS, _WIDTH) for _ in range(3))
    gain = _drawn(source, dtype, _WIDTH)
    wanted, gradients = _with_gradients(
        lambda x: F.rms_norm(x, (_WIDTH,), gain.double(), 1e-5), g, x
    )
    n, inverse = on_gpu.norm(x, gain, 1e-5)
    yield "norm", [n], [wanted]
    grad_x = on_gpu.norm_backward(g, x, inverse, gain, beside)
    yield "norm_backward", [grad_x], [gradients[0] + beside.double()]


def _gates(source: Generator, dtype: torch.dtype) -> Trial:
    for number, (name, function) in enumerate(ACTIVATION_FUNCTIONS.items()):
        gate, up, g = (_drawn(source, dtype, _ROWS, _WIDTH) for _ in range(3))
        wanted, gradients = _with_gradients(
            lambda gate, up, act=function: act(gate) * up, g, gate, up
        )
        yield f"gated ({name})", [on_gpu.gated(gate, up, number)], [wanted]
        yield f"gated_backward ({name})", on_gpu.gated_backward(g, gate, up, number), gradients


def _rotation(source: Generator, dtype: torch.dtype) -> Trial:
    x, size = _drawn(source, dtype, _ROWS, _WIDTH), _WIDTH // 3
    cos, sin = (_drawn(source, dtype, 1, _ROWS // 2, size) for _ in range(2))

    def rotate(x: Tensor) -> Tensor:
        first, second = (heads := x.view(2, -1, 3, size)).chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (heads * cos.double()[:, :, None] + turned * sin.double()[:, :, None]).view(x.shape)

    wanted, gradients = _with_gradients(rotate, x, x)
    yield "rotated", [on_gpu.rotated(x, cos, sin, back=False)], [wanted]
    yield "rotated back", [on_gpu.rotated(x, cos, sin, back=True)], gradients


def _drawn(source: Generator, dtype: torch.dtype, *size: int) -> Tensor:
    wide = torch.randn(size, generator=source, device=source.device, dtype=torch.float32)
    return wide.to(dtype)


def _with_gradients(
    formula: Callable[..., Tensor], g: Tensor, *given: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The formula in float64, and the gradients of what it is given."""
    with torch.enable_grad():
        leaves = [each.detach().double().requires_grad_() for each in given]
        value = formula(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, g.double())
