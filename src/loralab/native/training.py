"""The kernels of the training step: low-rank pairs, norms, gates, rotary positions, attention.

On a CPU they are C++ (`on_cpu`), on a GPU Triton (`on_gpu`). Every function has a twin in torch's
operations at its caller, which runs where `covers` says no.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.native import on_cpu, on_gpu
from loralab.native.on_cpu import COLUMNS, KERNEL, MOST_PAIRS, Attention
from loralab.native.pairs import ACTIVATION_FUNCTIONS, ACTIVATIONS, Mask, OtherRows, Pair, Rows
from loralab.placement import device_kind

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_FUNCTIONS",
    "COLUMNS",
    "KERNEL",
    "MOST_PAIRS",
    "Attention",
    "Mask",
    "Pair",
]

_KERNELS: dict[str, ModuleType] = {"cpu": on_cpu, "cuda": on_gpu}


def build_name(device: torch.device) -> str:
    """Which build of the kernels runs there, on which the bits of a step depend; "none" where
    torch's operations stand in."""
    kernels = _KERNELS.get(device.type)
    return "none" if kernels is None else kernels.build_name()


def covers(*rows: Tensor) -> bool:
    """Whether the kernels compute with these rows: of one dtype that they know, one after another
    in memory, of widths that they know; and there are kernels."""
    first = rows[0]
    kernels = _KERNELS.get(device_kind(first))
    if kernels is None or torch.compiler.is_compiling():
        return False
    alike = all(each.dtype == first.dtype and each.is_contiguous() for each in rows)
    return alike and kernels.covers(rows)


def covers_pairs(x: Rows, As: Sequence[Tensor], pairs: Sequence[Pair]) -> bool:
    """Whether the kernels compute what these pairs add."""
    factors = [*As, *(pair.B for pair in pairs)]
    return (
        0 < len(pairs) <= MOST_PAIRS
        and all(f.dtype == torch.float32 and f.is_contiguous() for f in factors)
        and covers(x, *(pair.rows for pair in pairs))
    )


def covers_rotation(rows: Rows, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernels rotate such rows: on a CPU the kernel of attention does it by itself."""
    return device_kind(rows) != "cpu" and covers(rows, cos, sin)


def add_pairs(
    x: Rows, As: Sequence[Float[Tensor, "_ in"]], pairs: Sequence[Pair], mask: Mask | None
) -> None:
    """To the rows of each pair `s B A (m * x)`, in place; sums are fp32."""
    _kernels(x).add_pairs(x, As, pairs, mask)


def pairs_backward(
    x: Rows,
    As: Sequence[Float[Tensor, "_ in"]],
    pairs: Sequence[Pair],
    mask: Mask | None,
    grad_x: Rows | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of every A and every B; that of `x` through the pairs goes to `grad_x`."""
    return _kernels(x).pairs_backward(x, As, pairs, mask, grad_x)


def norm(x: Rows, gain: Float[Tensor, " width"], epsilon: float) -> tuple[Rows, Tensor]:
    """`gain * x / sqrt(mean(x^2) + epsilon)`, and the reciprocal of each row's root (fp32)."""
    return _kernels(x).norm(x, gain, epsilon)


def norm_backward(
    g: Rows, x: Rows, inverse: Tensor, gain: Float[Tensor, " width"], beside: Rows | None
) -> Rows:
    """The gradient of the norm's input, plus `beside`."""
    return _kernels(x).norm_backward(g, x, inverse, gain, beside)


def gated(gate: Rows, up: Rows, activation: int) -> Rows:
    """`act(gate) * up`; activation: its number in `ACTIVATIONS`."""
    return _kernels(gate).gated(gate, up, activation)


def gated_backward(g: Rows, gate: Rows, up: Rows, activation: int) -> tuple[Rows, Rows]:
    """The gradients of gate (in the memory of `g`) and up."""
    return _kernels(g).gated_backward(g, gate, up, activation)


def rotated(
    rows: Rows,
    cos: Float[Tensor, "_ tokens size"],
    sin: Float[Tensor, "_ tokens size"],
    *,
    back: bool,
) -> OtherRows:
    """Rotary positions (2104.09864) turned into rows of heads; `back` transposes it, for
    gradients. The rows are a batch's, token after token."""
    return on_gpu.rotated(rows, cos, sin, back=back)


def attention(
    rows: tuple[Rows, Rows, Rows],
    angles: tuple[Float[Tensor, "_ tokens size"], Float[Tensor, "_ tokens size"]],
    mask: Tensor | None,
    wanted: Tensor | None,
) -> Attention | None:
    """The attention of a batch by the kernel, as `Attention` has it; None where it is not covered.

    On a GPU it never is: torch has kernels of its own there.
    """
    if device_kind(rows[0]) != "cpu" or not covers(*rows, *angles):
        return None
    made = Attention(*rows, *angles, mask, wanted)
    return made if made.is_covered() else None


def _kernels(rows: Tensor) -> ModuleType:
    return _KERNELS[device_kind(rows)]
