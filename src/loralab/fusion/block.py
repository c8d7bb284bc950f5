"""A pre-norm block with rotary attention and a gated MLP as one autograd function.

    n = norm(x)      a = attention(rotary(Q n), rotary(K n), V n)     h = x + O a
    m = norm(h)      y = h + Down(act(Gate m) * Up m)

Q ... Down are frozen linear layers, each with a low-rank pair or without. Kept for the backward
pass: x, h, the rotated queries and keys, the values, the attention weights and output, and the
outputs of Gate and Up. Run again there: the norms, act, the gated product, the dropout masks and
the thin products; none of them is a large matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.adapters import SharedInput, draw_mask, project, project_backward
from loralab.fusion.attention import Attended, Mask, attend, attend_backward
from loralab.fusion.norms import Norm

Rows = Float[Tensor, "_ _"]
Heads = Float[Tensor, "batch _ _ head_size"]
Positions = Int[Tensor, "batch wanted"]


@dataclass(frozen=True)
class Block:
    """The layers of one block for one forward."""

    attention_norm: Norm
    queries_keys_values: SharedInput
    output: SharedInput
    mlp_norm: Norm
    gate_up: SharedInput
    down: SharedInput
    activation: nn.Module

    @property
    def inputs(self) -> tuple[SharedInput, SharedInput, SharedInput, SharedInput]:
        """The four inputs that linear layers read, in order."""
        return self.queries_keys_values, self.output, self.gate_up, self.down

    def split(self, factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """`A, B` of all pairs in a row, as those of each of `inputs`."""
        parts, at = [], 0
        for shared in self.inputs:
            parts.append(factors[at : at + shared.num_factors])
            at += shared.num_factors
        return parts


class Angles(NamedTuple):
    """Cosines and sines of the rotary positions."""

    cos: Float[Tensor, "_ tokens head_size"]
    sin: Float[Tensor, "_ tokens head_size"]


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs beside `x`, the angles and the factors."""

    attended: Attended
    attention: Rows
    h: Rows
    gate: Rows
    up: Rows
    places: tuple[Tensor | None, ...]  # of the dropout masks of `Block.inputs`

    NUM_TENSORS: ClassVar[int] = 13

    def tensors(self) -> list[Tensor | None]:
        """All of them in a row, as autograd keeps them."""
        return [*self.attended, self.attention, self.h, self.gate, self.up, *self.places]

    @staticmethod
    def of(tensors: Sequence[Any]) -> "Kept":
        """The other way round."""
        attention, h, gate, up, *places = tensors[5:]
        return Kept(Attended(*tensors[:5]), attention, h, gate, up, tuple(places))


def block_forward(
    x: Float[Tensor, "batch tokens width"],
    block: Block,
    angles: Angles,
    mask: Mask,
    factors: Sequence[Tensor],
    wanted: Positions | None = None,
) -> tuple[Float[Tensor, "batch tokens width"], Kept]:
    """The block's output, and what its backward pass needs.

    With `wanted` positions only these are computed beyond keys and values; others are zero.
    """
    of_qkv, of_output, of_gate_up, of_down = block.split(factors)

    n, _ = block.attention_norm.forward(_rows(x))
    qkv_places = draw_mask(n, block.queries_keys_values)
    q, k, v = (
        _heads(projected, x, angles)
        for projected in project(n, block.queries_keys_values, of_qkv, qkv_places)
    )
    q, k, v = take(rotate(q, angles), wanted), rotate(k, angles), v.contiguous()
    attended_heads, attended = attend(q, k, v, mask if wanted is None else _seen(mask, wanted, x))
    attention = _rows_of_heads(attended_heads)
    output_places = draw_mask(attention, block.output)
    h = project(attention, block.output, of_output, output_places)[0]
    h = h.add_(_rows(take(x, wanted)))

    m, _ = block.mlp_norm.forward(h)
    gate_up_places = draw_mask(m, block.gate_up)
    gate, up = project(m, block.gate_up, of_gate_up, gate_up_places)
    gated = block.activation(gate).mul_(up)
    down_places = draw_mask(gated, block.down)
    y = project(gated, block.down, of_down, down_places)[0].add_(h)

    places = (qkv_places, output_places, gate_up_places, down_places)
    kept = Kept(attended, attention, h, gate, up, places)
    return put(y.view(x.shape[0], -1, x.shape[-1]), wanted, x), kept


def block_backward(
    g: Float[Tensor, "batch tokens width"],
    x: Float[Tensor, "batch tokens width"],
    block: Block,
    angles: Angles,
    factors: Sequence[Tensor],
    kept: Kept,
    wanted: Positions | None = None,
    *,
    wants_input: bool,
) -> tuple[Float[Tensor, "batch tokens width"] | None, list[Tensor]]:
    """The gradients of `x` (None where unwanted) and of the factors."""
    of_qkv, of_output, of_gate_up, of_down = block.split(factors)
    qkv_places, output_places, gate_up_places, down_places = kept.places
    grad_y = _rows(take(g, wanted))

    with torch.enable_grad():
        gate = kept.gate.detach().requires_grad_()
        activated = block.activation(gate)
    gated = activated.detach() * kept.up
    grad_gated, grad_down = project_backward([grad_y], gated, block.down, of_down, down_places)
    assert grad_gated is not None
    grad_up = grad_gated * activated.detach()
    (grad_gate,) = torch.autograd.grad(activated, gate, grad_gated.mul_(kept.up))
    m, scales_h = block.mlp_norm.forward(kept.h)
    grad_m, grad_gate_up = project_backward(
        [grad_gate, grad_up], m, block.gate_up, of_gate_up, gate_up_places
    )
    assert grad_m is not None
    grad_h = block.mlp_norm.backward(grad_m, kept.h, scales_h).add_(grad_y)

    grad_attention, grad_output = project_backward(
        [grad_h], kept.attention, block.output, of_output, output_places
    )
    assert grad_attention is not None
    grad_q, grad_k, grad_v = attend_backward(_heads(grad_attention, x, angles), kept.attended)
    grad_q = put(grad_q, wanted, x)
    grad_qkv = [
        _rows_of_heads(heads)
        for heads in (rotate_back(grad_q, angles), rotate_back(grad_k, angles), grad_v)
    ]
    n, scales_x = block.attention_norm.forward(_rows(x))
    grad_n, grad_factors = project_backward(
        grad_qkv, n, block.queries_keys_values, of_qkv, qkv_places, wants_input=wants_input
    )
    grad_factors = [*grad_factors, *grad_output, *grad_gate_up, *grad_down]
    if grad_n is None:
        return None, grad_factors
    grad_x = block.attention_norm.backward(grad_n, _rows(x), scales_x)
    residual = put(grad_h.view(x.shape[0], -1, x.shape[-1]), wanted, x)
    return grad_x.view(x.shape).add_(residual), grad_factors


class BlockStep(torch.autograd.Function):
    """`block_forward` with `block_backward` as its gradient."""

    @staticmethod
    @no_type_check
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        angles: Angles,
        mask: Mask,
        wanted: Positions | None,
        *factors: Tensor,
    ):
        y, kept = block_forward(x, block, angles, mask, factors, wanted)
        ctx.block = block
        ctx.save_for_backward(x, *angles, wanted, *kept.tensors(), *factors)
        return y

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx: Any, g: Tensor):
        x, cos, sin, wanted, *saved = ctx.saved_tensors
        kept, factors = Kept.of(saved[: Kept.NUM_TENSORS]), saved[Kept.NUM_TENSORS :]
        wants_input = ctx.needs_input_grad[0]
        grad_x, grad_factors = block_backward(
            g, x, ctx.block, Angles(cos, sin), factors, kept, wanted, wants_input=wants_input
        )
        return grad_x, None, None, None, None, *grad_factors


def take(values: Tensor, wanted: Positions | None) -> Tensor:
    """The wanted positions (the last dimension but one) of each row of the batch."""
    if wanted is None:
        return values
    return values.gather(-2, _spread(wanted, values))


def put(values: Tensor, wanted: Positions | None, like: Tensor) -> Tensor:
    """The transpose of `take`: back to where they came from, zeros elsewhere."""
    if wanted is None:
        return values
    whole = values.new_zeros(*values.shape[:-2], like.shape[1], values.shape[-1])
    return whole.scatter_(-2, _spread(wanted, values), values)


def _spread(wanted: Positions, values: Tensor) -> Tensor:
    """Positions as indices of every number that stands there."""
    shape = (wanted.shape[0], *(1 for _ in values.shape[1:-2]), wanted.shape[1], 1)
    return wanted.view(shape).expand(*values.shape[:-2], wanted.shape[1], values.shape[-1])


def _seen(mask: Mask, wanted: Positions, x: Tensor) -> Mask:
    """The wanted queries' rows of the mask."""
    num_tokens = x.shape[1]
    if mask is None:
        mask = x.new_ones(num_tokens, num_tokens, dtype=torch.bool).tril()[None, None]
    return take(mask.expand(x.shape[0], -1, -1, -1), wanted)


def rotate(heads: Heads, angles: Angles) -> Heads:
    """Rotary positions (2104.09864): the two halves of a head turn against each other."""
    half = heads.shape[-1] // 2
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


def rotate_back(g: Heads, angles: Angles) -> Heads:
    """The transpose of `rotate`."""
    half = g.shape[-1] // 2
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    turned = g * cos
    turned[..., :half].addcmul_(g[..., half:], sin[..., half:])
    turned[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
    return turned


def _heads(rows: Rows, like: Tensor, angles: Angles) -> Heads:
    return rows.view(
        like.shape[0], -1, rows.shape[1] // angles.cos.shape[-1], angles.cos.shape[-1]
    ).transpose(1, 2)


def _rows_of_heads(heads: Heads) -> Rows:
    return _rows(heads.transpose(1, 2).flatten(2))


def _rows(x: Float[Tensor, "batch _ _"]) -> Rows:
    return x.reshape(-1, x.shape[-1])
