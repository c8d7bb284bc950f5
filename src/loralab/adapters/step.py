"""The training step of adapted linear layers: one autograd function that keeps the least.

`y = W x + s B A (m * x) / (1 - p)` with a dropout mask m. Kept for the backward pass: the input
(once, where several layers read the same tensor) and eight bytes a row that bring m back. Not kept:
`A x`, the masked input, the mask, the low-rank output. Masters A and B are fp32 and compute in the
base's dtype. All that the pairs do is one call of a kernel (room native) where there is one;
elsewhere it is torch's products, in the layouts that are fast on CPUs: `(h' g)'` and not `g' h`
(benchmarks/LOG.md).

The plain formula is `layers.low_rank`; here it stands once more, with its gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters.noise import Places, draw_places, mask_at, stream_of, table
from loralab.native import products, training as native
from loralab.native.training import Pair

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
    outputs = products.linear(x, shared.weights, shared.biases)
    for part, own in shared.split(factors):
        own_x, As = x[part.rows], own[::2]
        pairs = _pairs(outputs, part, own)
        if native.covers_pairs(own_x, As, pairs):
            native.add_pairs(own_x, As, pairs, _kernel_mask(x, part, places))
        else:
            _add_pairs(own_x, As, pairs, _mask(x, part, places))
    return outputs


def _add_pairs(x: Tensor, As: Sequence[Tensor], pairs: Sequence[Pair], mask: Tensor | None) -> None:
    """To the rows of each pair `s B A (m * x)`, in place."""
    dropped = x if mask is None else mask.mul_(x)
    hidden = dropped @ _stacked(As, x.dtype).mT
    ranks = [len(A) for A in As]
    for pair, h in zip(pairs, hidden.split(ranks, dim=1), strict=True):
        pair.rows.addmm_(h, pair.B.to(x.dtype).mT, alpha=pair.scale)


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
        own_x, As = x[part.rows], own[::2]
        own_grad_x = None if grad_x is None else grad_x[part.rows]
        pairs = _pairs(gradients, part, own)
        if native.covers_pairs(own_x, As, pairs):
            mask = _kernel_mask(x, part, places)
            grad_As, grad_Bs = native.pairs_backward(own_x, As, pairs, mask, own_grad_x)
        else:
            mask = _mask(x, part, places)
            grad_As, grad_Bs = _pairs_backward(own_x, As, pairs, mask, own_grad_x)
        for grads, master in zip(zip(grad_As, grad_Bs, strict=True), own[::2], strict=True):
            grad_factors += [grad.to(master.dtype) for grad in grads]
    if wants_input:
        grad_x = products.linear_backward(gradients, shared.weights, grad_x)
    return grad_x, grad_factors


def _pairs_backward(
    x: Tensor,
    As: Sequence[Tensor],
    pairs: Sequence[Pair],
    mask: Tensor | None,
    grad_x: Tensor | None,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """The gradients of every A and every B; that of `x` through the pairs goes to `grad_x`."""
    A, ranks = _stacked(As, x.dtype), [len(A) for A in As]
    dropped = x if mask is None else mask * x
    hidden = dropped @ A.mT
    grad_hidden = torch.empty_like(hidden)
    grad_Bs = []
    columns = zip(hidden.split(ranks, dim=1), grad_hidden.split(ranks, dim=1), strict=True)
    for pair, (h, grad_h) in zip(pairs, columns, strict=True):
        torch.mm(pair.rows, pair.B.to(x.dtype), out=grad_h).mul_(pair.scale)
        grad_Bs.append((h.mT @ pair.rows).mT * pair.scale)
    grad_A = grad_hidden.mT @ dropped
    if grad_x is not None:
        through = torch.mm(grad_hidden, A, out=grad_x)
        if mask is not None:
            through.mul_(mask)
    return grad_A.split(ranks), grad_Bs


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


def mask_dtype(weight: Tensor) -> torch.dtype:
    """In which dtype the step of the layer with this weight reads its dropout mask."""
    by_kernel = weight.ndim == 2 and weight.shape[0] % native.COLUMNS == 0 and native.covers(weight)
    return torch.uint8 if by_kernel else weight.dtype


def _kernel_mask(x: Tensor, part: Part, places: Places | None) -> native.Mask | None:
    if places is None or not part.dropout:
        return None
    flips = table(x.shape[-1], part.dropout, torch.uint8, x.device)
    return native.Mask(flips, places[part.rows])


def _stacked(As: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "ranks in"]:
    """The A of all pairs as one matrix, so that the shared input is read once."""
    own = [A.to(dtype) for A in As]
    return own[0] if len(own) == 1 else torch.cat(own)


def _pairs(values: Sequence[Tensor], part: Part, factors: Sequence[Tensor]) -> list[Pair]:
    """The pair of each layer that has one, with the part's rows of the layer's value."""
    Bs = iter(factors[1::2])
    return [
        Pair(next(Bs), scale, value[part.rows])
        for value, scale in zip(values, part.scales, strict=True)
        if scale is not None
    ]


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
        return tuple(_unrolled(y, x.shape) for y in outputs)

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


def _unrolled(y: Float[Tensor, "rows out"], shape: torch.Size) -> Float[Tensor, "*rows out"]:
    """`y` in the rows of `shape`. Not a view to autograd: models change such outputs in place."""
    return torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[-1]])
