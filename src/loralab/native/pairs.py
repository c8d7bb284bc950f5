"""What the kernels of the training step are given, on a CPU and on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""Of gates, by the kernels' numbers."""

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
