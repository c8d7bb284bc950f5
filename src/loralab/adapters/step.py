"""The training step of adapted linear layers: one autograd function that keeps the least.

`y = W x + s B A (m * x) / (1 - p)` with a dropout mask m. Kept for the backward pass: the input
(once, where several layers read the same tensor) and eight bytes a row that bring m back. Not kept:
`A x`, the masked input, the mask, the low-rank output. Masters A and B are fp32 and compute in the
base's dtype. Layouts of the thin products are the ones that are fast on CPUs: `(h' g)'` and not
`g' h` (benchmarks/LOG.md).

The plain formula is `layers.low_rank`; here it stands once more, with its gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.noise import Places, draw_places, kept, mask_at


@dataclass(frozen=True)
class SharedInput:
    """Frozen linear layers that read the same input, and the scales of the pairs added to them.

    weights: (out, in) of each layer. scales: `scale / (1 - dropout)` of each layer's pair, None
    where the layer has none. One dropout mask serves all of them.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    scales: tuple[float | int | None, ...]
    dropout: float | int = 0.0

    @property
    def num_factors(self) -> int:
        """How many tensors `A, B, A, B, ...` belong to the pairs."""
        return 2 * sum(scale is not None for scale in self.scales)


def draw_mask(x: Float[Tensor, "*rows in"], shared: SharedInput) -> Places | None:
    """What brings the input's dropout mask back; None without dropout."""
    return draw_places(x) if shared.dropout and shared.num_factors else None


def project(
    x: Float[Tensor, "rows in"],
    shared: SharedInput,
    factors: Sequence[Float[Tensor, "_ _"]],
    places: Places | None,
) -> list[Float[Tensor, "rows _"]]:
    """Each layer's `W x + b + s B A (m * x)`.

    factors: `A, B` of each pair, in the layers' order. places: of the mask m.
    """
    outputs = [F.linear(x, w, b) for w, b in zip(shared.weights, shared.biases, strict=True)]
    if not factors:
        return outputs
    dropped = x if places is None else kept(x, places, shared.dropout)
    hidden = dropped @ _stacked(factors, x.dtype).mT
    for y, scale, B, h in _pairs(outputs, shared, factors, hidden):
        y.addmm_(h, B.mT, alpha=scale)
    return outputs


def project_backward(
    gradients: Sequence[Float[Tensor, "rows _"]],
    x: Float[Tensor, "rows in"],
    shared: SharedInput,
    factors: Sequence[Float[Tensor, "_ _"]],
    places: Places | None,
    *,
    wants_input: bool = True,
) -> tuple[Float[Tensor, "rows in"] | None, list[Float[Tensor, "_ _"]]]:
    """The gradient of the input (None where unwanted) and those of the factors, in their dtype."""
    grad_factors: list[Tensor] = []
    grad_x = None
    if factors:
        A = _stacked(factors, x.dtype)
        mask = None if places is None else mask_at(x, places, shared.dropout)
        dropped = x if mask is None else mask * x
        hidden = dropped @ A.mT
        grad_hidden = torch.empty_like(hidden)
        grad_Bs = []
        at = 0
        for g, scale, B, h in _pairs(gradients, shared, factors, hidden):
            torch.mm(g, B, out=grad_hidden[:, at : at + B.shape[1]]).mul_(scale)
            grad_Bs.append((h.mT @ g).mT * scale)
            at += B.shape[1]
        grad_A = grad_hidden.mT @ dropped
        ranks = [B.shape[1] for B in factors[1::2]]
        for own_A, own_B, master in zip(grad_A.split(ranks), grad_Bs, factors[::2], strict=True):
            grad_factors += [own_A.to(master.dtype), own_B.to(master.dtype)]
        if wants_input:
            grad_x = grad_hidden @ A
            if mask is not None:
                grad_x.mul_(mask)
    if wants_input:
        for g, weight in zip(gradients, shared.weights, strict=True):
            grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
    return grad_x, grad_factors


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "ranks in"]:
    """The A of all pairs as one matrix, so that the shared input is read once."""
    own = [A.to(dtype) for A in factors[::2]]
    return own[0] if len(own) == 1 else torch.cat(own)


def _pairs(
    values: Sequence[Tensor], shared: SharedInput, factors: Sequence[Tensor], hidden: Tensor
) -> Iterator[tuple[Tensor, float | int, Tensor, Tensor]]:
    """(value, scale, B, hidden) of each layer that has a pair; hidden in the stack's columns."""
    Bs = iter(factors[1::2])
    at = 0
    for value, scale in zip(values, shared.scales, strict=True):
        if scale is not None:
            B = next(Bs).to(hidden.dtype)
            yield value, scale, B, hidden[:, at : at + B.shape[1]]
            at += B.shape[1]


def low_rank_step(
    x: Float[Tensor, "*rows in"], shared: SharedInput, factors: Sequence[Float[Tensor, "_ _"]]
) -> tuple[Float[Tensor, "*rows _"], ...]:
    """Each layer's output for the input `x`, differentiable in `x` and the factors."""
    places = draw_mask(x, shared)
    return LowRankStep.apply(x, shared, places, *factors)


class LowRankStep(torch.autograd.Function):
    """`project` with the gradient above, for inputs of any number of dimensions."""

    @staticmethod
    @no_type_check
    def forward(ctx: Any, x: Tensor, shared: SharedInput, places: Places | None, *factors: Tensor):
        ctx.shared = shared
        ctx.save_for_backward(x, places, *factors)
        outputs = project(_rows(x), shared, factors, places)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx: Any, *gradients: Tensor):
        x, places, *factors = ctx.saved_tensors
        wants_input = ctx.needs_input_grad[0]
        grad_x, grad_factors = project_backward(
            [_rows(g) for g in gradients],
            _rows(x),
            ctx.shared,
            factors,
            places,
            wants_input=wants_input,
        )
        return grad_x.view(x.shape) if wants_input else None, None, None, *grad_factors


def _rows(x: Tensor) -> Float[Tensor, "rows in"]:
    return x.reshape(-1, x.shape[-1])
