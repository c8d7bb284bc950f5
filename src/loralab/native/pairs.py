"""What the kernels of the training step are given, on a CPU and on a GPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
)
"""Of gates, in the order of the kernels' numbers."""

ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)

Rows = Float[Tensor, "rows _"]
OtherRows = Float[Tensor, "_ _"]


@dataclass(frozen=True)
class Pair:
    """The pair of one layer: `rows` are its outputs, or the gradients of its outputs."""

    B: Float[Tensor, "out rank"]
    scale: float | int
    rows: Float[Tensor, "rows out"]


@dataclass(frozen=True)
class Mask:
    """Which inputs are kept: each row's `width` flips from its place on."""

    flips: UInt8[Tensor, " flips"]
    places: Int[Tensor, " rows"]


def stacked(factors: Sequence[Tensor]) -> Float[Tensor, "ranks in"]:
    """The A of all pairs that read the same input, as one."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))
