"""The training step of adapted linear layers: one autograd function that keeps the least.

`y = W x + s B A (m * x) / (1 - p)` with a dropout mask m. Kept for the backward pass: the input
(once, where several layers read the same tensor) and eight bytes a row that bring m back. Not kept:
`A x`, the masked input, the mask, the low-rank output. Masters A and B are fp32 and compute in the
base's dtype. Layouts of the thin products are the ones that are fast on CPUs: `(h' g)'` and not
`g' h` (benchmarks/LOG.md).

The plain formula is `layers.low_rank`; here it stands once more, with its gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.noise import Places, draw_places, mask_at, stream_of

EVERY_ROW = slice(None)


@dataclass(frozen=True)
class Part:
    """Rows of an input that use the same adapter.

    scales: `scale / (1 - dropout)` of the pair of each layer that reads the input, None where the
    layer has none. One dropout mask serves all of them. name: whose stream the mask is drawn from.
    """

    scales: tuple[float | int | None, ...]
    dropout: float | int = 0.0
    name: str = ""
    rows: slice = field(default_factory=lambda: EVERY_ROW)

    @property
    def num_factors(self) -> int:
        """How many tensors `A, B, A, B, ...` belong to the pairs."""
        return 2 * sum(scale is not None for scale in self.scales)


@dataclass(frozen=True)
class SharedInput:
    """Frozen linear layers that read the same input, and what adapters add to their outputs.

    weights: (out, in) of each layer. parts: with rows that do not meet; the other rows are the
    base's alone.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    parts: tuple[Part, ...] = ()

    @property
    def num_factors(self) -> int:
        """How many tensors `A, B, A, B, ...` belong to the pairs of all parts."""
        return sum(part.num_factors for part in self.parts)

    def split(self, factors: Sequence[Tensor]) -> Iterator[tuple[Part, Sequence[Tensor]]]:
        """Each part with its own factors."""
        at = 0
        for part in self.parts:
            yield part, factors[at : at + part.num_factors]
            at += part.num_factors


def draw_mask(x: Float[Tensor, "*rows in"], shared: SharedInput) -> Places | None:
    """What brings the dropout mask of the input's rows back; None without dropout."""
    if not any(part.dropout for part in shared.parts):
        return None
    first = shared.parts[0]
    if first.rows == EVERY_ROW:
        return draw_places(x, stream_of(first.name))
    flat = _rows(x)
    places = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
    for part in shared.parts:
        if part.dropout:
            places[part.rows] = draw_places(flat[part.rows], stream_of(part.name))
    return places


def project(
    x: Float[Tensor, "rows in"],
    shared: SharedInput,
    factors: Sequence[Float[Tensor, "_ _"]],
    places: Places | None,
) -> list[Float[Tensor, "rows _"]]:
    """Each layer's `W x + b + s B A (m * x)`, with the s, A and B of the row's part.

    factors: `A, B` of each pair, in the layers' order, part after part. places: of the mask m.
    """
    outputs = [F.linear(x, w, b) for w, b in zip(shared.weights, shared.biases, strict=True)]
    for part, own in shared.split(factors):
        mask = _mask(x, part, places)
        dropped = x[part.rows] if mask is None else mask.mul_(x[part.rows])
        hidden = dropped @ _stacked(own, x.dtype).mT
        for y, scale, B, h in _pairs(outputs, part, own, hidden):
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
    grad_x = _empty_gradient(x, shared) if wants_input else None
    for part, own in shared.split(factors):
        A = _stacked(own, x.dtype)
        mask = _mask(x, part, places)
        dropped = x[part.rows] if mask is None else mask * x[part.rows]
        hidden = dropped @ A.mT
        grad_hidden = torch.empty_like(hidden)
        grad_Bs = []
        at = 0
        for g, scale, B, h in _pairs(gradients, part, own, hidden):
            torch.mm(g, B, out=grad_hidden[:, at : at + B.shape[1]]).mul_(scale)
            grad_Bs.append((h.mT @ g).mT * scale)
            at += B.shape[1]
        grad_A = grad_hidden.mT @ dropped
        ranks = [B.shape[1] for B in own[1::2]]
        for own_A, own_B, master in zip(grad_A.split(ranks), grad_Bs, own[::2], strict=True):
            grad_factors += [own_A.to(master.dtype), own_B.to(master.dtype)]
        if grad_x is not None:
            through = torch.mm(grad_hidden, A, out=grad_x[part.rows])
            if mask is not None:
                through.mul_(mask)
    if wants_input:
        for g, weight in zip(gradients, shared.weights, strict=True):
            grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
    return grad_x, grad_factors


def _empty_gradient(x: Tensor, shared: SharedInput) -> Tensor | None:
    """Room for the gradient of the input that comes through the parts; None without any."""
    if not shared.parts:
        return None
    every = sum(len(range(*part.rows.indices(len(x)))) for part in shared.parts) == len(x)
    return torch.empty_like(x) if every else torch.zeros_like(x)


def _mask(x: Tensor, part: Part, places: Places | None) -> Tensor | None:
    if places is None or not part.dropout:
        return None
    return mask_at(x[part.rows], places[part.rows], part.dropout)


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "ranks in"]:
    """The A of all pairs as one matrix, so that the shared input is read once."""
    own = [A.to(dtype) for A in factors[::2]]
    return own[0] if len(own) == 1 else torch.cat(own)


def _pairs(
    values: Sequence[Tensor], part: Part, factors: Sequence[Tensor], hidden: Tensor
) -> Iterator[tuple[Tensor, float | int, Tensor, Tensor]]:
    """(the part's rows of the value, scale, B, hidden) of each layer that has a pair; hidden in
    the stack's columns."""
    Bs = iter(factors[1::2])
    at = 0
    for value, scale in zip(values, part.scales, strict=True):
        if scale is not None:
            B = next(Bs).to(hidden.dtype)
            yield value[part.rows], scale, B, hidden[:, at : at + B.shape[1]]
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
