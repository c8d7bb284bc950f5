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
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.adapters import SharedInput, draw_mask, project, project_backward
from loralab.fusion.attention import Attended, Mask, attend, attend_backward
from loralab.fusion.norms import Norm

Rows = Float[Tensor, "rows _"]
Heads = Float[Tensor, "batch _ tokens head_size"]


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
) -> tuple[Float[Tensor, "batch tokens width"], Kept]:
    """The block's output, and what its backward pass needs."""
    of_qkv, of_output, of_gate_up, of_down = block.split(factors)
    rows = x.reshape(-1, x.shape[-1])

    n, _ = block.attention_norm.forward(rows)
    qkv_places = draw_mask(n, block.queries_keys_values)
    q, k, v = (
        _heads(projected, x, angles)
        for projected in project(n, block.queries_keys_values, of_qkv, qkv_places)
    )
    attended_heads, attended = attend(rotate(q, angles), rotate(k, angles), v.contiguous(), mask)
    attention = _rows(attended_heads)
    output_places = draw_mask(attention, block.output)
    h = project(attention, block.output, of_output, output_places)[0].add_(rows)

    m, _ = block.mlp_norm.forward(h)
    gate_up_places = draw_mask(m, block.gate_up)
    gate, up = project(m, block.gate_up, of_gate_up, gate_up_places)
    gated = block.activation(gate).mul_(up)
    down_places = draw_mask(gated, block.down)
    y = project(gated, block.down, of_down, down_places)[0].add_(h)

    places = (qkv_places, output_places, gate_up_places, down_places)
    kept = Kept(attended, attention, h, gate, up, places)
    return y.view(x.shape), kept


def block_backward(
    g: Float[Tensor, "batch tokens width"],
    x: Float[Tensor, "batch tokens width"],
    block: Block,
    angles: Angles,
    factors: Sequence[Tensor],
    kept: Kept,
    *,
    wants_input: bool,
) -> tuple[Float[Tensor, "batch tokens width"] | None, list[Tensor]]:
    """The gradients of `x` (None where unwanted) and of the factors."""
    of_qkv, of_output, of_gate_up, of_down = block.split(factors)
    qkv_places, output_places, gate_up_places, down_places = kept.places
    rows, grad_y = x.reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])

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
    grad_qkv = [
        _rows(rotate_back(grad_q, angles)),
        _rows(rotate_back(grad_k, angles)),
        _rows(grad_v),
    ]
    n, scales_x = block.attention_norm.forward(rows)
    grad_n, grad_factors = project_backward(
        grad_qkv, n, block.queries_keys_values, of_qkv, qkv_places, wants_input=wants_input
    )
    grad_factors = [*grad_factors, *grad_output, *grad_gate_up, *grad_down]
    if grad_n is None:
        return None, grad_factors
    grad_x = block.attention_norm.backward(grad_n, rows, scales_x).add_(grad_h)
    return grad_x.view(x.shape), grad_factors


class BlockStep(torch.autograd.Function):
    """`block_forward` with `block_backward` as its gradient."""

    @staticmethod
    @no_type_check
    def forward(ctx: Any, x: Tensor, block: Block, angles: Angles, mask: Mask, *factors: Tensor):
        y, kept = block_forward(x, block, angles, mask, factors)
        ctx.block = block
        ctx.save_for_backward(x, *angles, *kept.tensors(), *factors)
        return y

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx: Any, g: Tensor):
        x, cos, sin, *saved = ctx.saved_tensors
        kept = Kept.of(saved[: Kept.NUM_TENSORS])
        grad_x, grad_factors = block_backward(
            g,
            x,
            ctx.block,
            Angles(cos, sin),
            saved[Kept.NUM_TENSORS :],
            kept,
            wants_input=ctx.needs_input_grad[0],
        )
        return grad_x, None, None, None, *grad_factors


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
    batch, tokens = like.shape[:2]
    return rows.view(batch, tokens, -1, angles.cos.shape[-1]).transpose(1, 2)


def _rows(heads: Heads) -> Rows:
    return heads.transpose(1, 2).reshape(-1, heads.shape[1] * heads.shape[3])
