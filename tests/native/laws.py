"""Laws of the training step's kernels, on a CPU and on a GPU, against torch in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.native import training as native

TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of 2-norms


def assert_near(got: Tensor, wanted: Tensor, rounded: torch.dtype | None = None) -> None:
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < TOLERANCE[rounded or got.dtype], float(error)


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def check_pairs(
    dtype: torch.dtype,
    dropped: bool,
    rows: int,
    ranks: list[int],
    outs: list[int],
    width: int = 64,
    hidden: torch.dtype = torch.float32,
) -> None:
    """hidden: in which dtype `A x` and `B' g` are kept, on which the factors' gradients depend."""
    torch.manual_seed(0)
    x, scale = torch.randn(rows, width).to(dtype), 0.5
    As = [torch.randn(rank, width) for rank in ranks]
    Bs = [torch.randn(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    outputs = [torch.randn(rows, out).to(dtype) for out in outs]
    gradients = [torch.randn(rows, out).to(dtype) for out in outs]
    flips, places = (torch.rand(900) > 0.3).to(torch.uint8), torch.randint(901 - width, (rows,))
    kept = (
        flips.unfold(0, width, 1)[places].double() if dropped else torch.ones(rows, width).double()
    )
    mask = native.Mask(flips, places) if dropped else None

    x_, *factors = doubles(x, *As, *Bs)
    As_, Bs_ = factors[: len(As)], factors[len(As) :]
    added = [scale * (kept * x_) @ A.mT @ B.mT for A, B in zip(As_, Bs_, strict=True)]
    wanted = [y.double() + more.detach() for y, more in zip(outputs, added, strict=True)]
    torch.autograd.backward(added, [g.double() for g in gradients])

    pairs = [native.Pair(B, scale, y) for B, y in zip(Bs, outputs, strict=True)]
    assert native.covers_pairs(x, As, pairs)
    native.add_pairs(x, As, pairs, mask)
    for y, right in zip(outputs, wanted, strict=True):
        assert_near(y, right)
    pairs = [native.Pair(B, scale, g) for B, g in zip(Bs, gradients, strict=True)]
    grad_x = torch.full_like(x, torch.nan)
    grad_As, grad_Bs = native.pairs_backward(x, As, pairs, mask, grad_x)
    assert x_.grad is not None
    assert_near(grad_x, x_.grad)
    for got, leaf in zip([*grad_As, *grad_Bs], factors, strict=True):
        assert leaf.grad is not None
        assert_near(got, leaf.grad, hidden)
    unwanted = native.pairs_backward(x, As, pairs, mask, None)
    assert all(torch.equal(a, b) for a, b in zip(unwanted[0], grad_As, strict=True))


def check_norm(dtype: torch.dtype, rows: int = 37, width: int = 96) -> None:
    torch.manual_seed(0)
    x, g, beside = (torch.randn(rows, width).to(dtype) for _ in range(3))
    gain = torch.randn(width).to(dtype)
    (x_,) = doubles(x)
    wanted = F.rms_norm(x_, (width,), gain.double(), 1e-5)
    wanted.backward(g.double())
    n, inverse = native.norm(x, gain, 1e-5)
    assert_near(n, wanted)
    assert x_.grad is not None
    assert_near(native.norm_backward(g, x, inverse, gain, beside), x_.grad + beside.double())


def check_gates(dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    gate, up, g = (torch.randn(19, 48).mul(scale).to(dtype) for scale in (4, 1, 1))
    gate[0, :4] = torch.tensor([-200.0, 200.0, -30.0, 0.0])
    gate_, up_ = doubles(gate, up)
    known = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    wanted = known[name](gate_) * up_
    wanted.backward(g.double())
    number = native.ACTIVATIONS.index(name)
    assert_near(native.gated(gate, up, number), wanted)
    for got, leaf in zip(native.gated_backward(g, gate, up, number), (gate_, up_), strict=True):
        assert leaf.grad is not None
        assert_near(got, leaf.grad)
