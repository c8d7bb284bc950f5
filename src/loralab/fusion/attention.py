"""Attention with grouped queries, forward and backward, in the form that is faster.

Plain products keep the weights (tokens x tokens for each head) and beat torch's kernel for short
rows on a CPU, whose backward is slow, in half precision above all (benchmarks/LOG.md). Everything
else is torch's kernel, whose forward runs again in the backward pass.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from loralab.placement import device_kind

SHORT_ROW_TOKENS = 128
"""Up to here the matrices of attention weights are small beside the other activations."""

Queries = Float[Tensor, "batch heads queries head_size"]
Keys = Float[Tensor, "batch groups tokens head_size"]
Mask = Bool[Tensor, "_ 1 _ tokens"] | Float[Tensor, "_ 1 _ tokens"] | None
"""True (or 0) where a query may look at a token; None: at itself and what is before it."""


class Attended(NamedTuple):
    """What the backward pass of attention needs; `weights` of plain products only.

    Where room native attends (`pieces`), q, k and v are the projections' rows.
    """

    q: Queries
    k: Keys
    v: Keys
    mask: Mask
    weights: Tensor | None


def attend(q: Queries, k: Keys, v: Keys, mask: Mask) -> tuple[Queries, Attended]:
    """`softmax(q k' / sqrt(head_size)) v`; each key serves `heads / groups` heads in turn."""
    if device_kind(q) != "cpu" or k.shape[2] > SHORT_ROW_TOKENS:
        return _kernel(q, k, v, mask), Attended(q, k, v, mask, None)
    scores = (_grouped(q, k) @ k.mT).mul_(q.shape[-1] ** -0.5)
    weights = _masked(scores.view(*q.shape[:3], k.shape[2]), mask).softmax(-1).view(scores.shape)
    return (weights @ v).view(q.shape), Attended(q, k, v, None, weights)


def attend_backward(g: Queries, kept: Attended) -> tuple[Queries, Keys, Keys]:
    """The gradients of q, k and v for the gradient `g` of the output."""
    q, k, v, mask, weights = kept
    if weights is None:
        with torch.enable_grad():
            q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
            output = _kernel(q, k, v, mask)
        grad_q, grad_k, grad_v = torch.autograd.grad(output, (q, k, v), g)
        return grad_q, grad_k, grad_v
    grouped = _grouped(g, k)
    grad_v = weights.mT @ grouped
    grad_scores = torch.ops.aten._softmax_backward_data(grouped @ v.mT, weights, -1, g.dtype)
    grad_scores = grad_scores.mul_(q.shape[-1] ** -0.5)
    return (grad_scores @ k).view(q.shape), grad_scores.mT @ _grouped(q, k), grad_v


def _kernel(q: Queries, k: Keys, v: Keys, mask: Mask) -> Queries:
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and device_kind(q) != "cpu" and not _flash_takes(q, mask):
        # torch's other kernel of linear memory takes no grouped heads: without one of the two all
        # weights are made, 16 times what repeated keys and values take at 256 tokens
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        is_grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
    )


def _flash_takes(q: Queries, mask: Mask) -> bool:
    return mask is None and q.dtype in (torch.float16, torch.bfloat16)


def _grouped(q: Queries, k: Keys) -> Float[Tensor, "batch groups _ head_size"]:
    """The queries of all heads that share a key, one after another."""
    return q.reshape(*k.shape[:2], -1, q.shape[-1])


def _masked(scores: Float[Tensor, "batch heads queries tokens"], mask: Mask) -> Tensor:
    if mask is None:
        mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(mask)
