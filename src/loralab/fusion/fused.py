"""Training forwards in which the blocks that match run as one autograd function each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import EVERY_ROW, member_in_force
from loralab.fusion.block import Block, BlockStep
from loralab.fusion.pattern import Matched, read_call
from loralab.fusion.pieces import Piece, Positions


@contextmanager
def fused(matched: Sequence[Matched], read: Positions | None = None) -> Iterator[None]:
    """Inside, the matched blocks run fused wherever gradients are wanted.

    read: the positions whose hidden states are read above the last block, where not all are; that
    block computes no more than these, and gives zeros elsewhere.

    A block runs as it is where the formula does not cover the call: mixes of adapters, rows
    in turns with adapters of their own, DoRA, trained norms, hooks on its parts, other arguments.
    """
    stood_in = [each for each in matched if "forward" not in vars(each.module)]
    for each in stood_in:
        wanted = read if each.is_last else None
        each.module.forward = _stand_in(each, each.module.forward, wanted)
    try:
        yield
    finally:
        for each in stood_in:
            del each.module.forward


def _stand_in(
    matched: Matched, original: Callable[..., Any], wanted: Positions | None
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = read_call(args, kwargs) if torch.is_grad_enabled() else None
        if call is not None:
            y = run_fused(matched, call.x.flatten(0, 1), [call.piece(0, wanted)])
            if y is not None:
                return y.view(call.x.shape)
        return original(*args, **kwargs)

    return forward


def run_fused(
    matched: Matched, x: Float[Tensor, "tokens width"], pieces: Sequence[Piece]
) -> Float[Tensor, "tokens width"] | None:
    """The block's output for the tokens of all pieces, differentiable; None where it must run as it
    is. Each adapter's rows are all rows, or those of one piece."""
    formula = _formula(matched, x)
    if formula is None:
        return None
    block, factors = formula
    places = [EVERY_ROW, *(piece.tokens for piece in pieces)]
    if any(part.rows not in places for shared in block.inputs for part in shared.parts):
        return None
    module: Any = matched.module
    if getattr(module, "gradient_checkpointing", False) and module.training:
        # transformers recomputes in the block's own forward, which this stands in for
        return module._gradient_checkpointing_func(BlockStep.apply, x, block, pieces, *factors)
    return BlockStep.apply(x, block, pieces, *factors)


def _formula(matched: Matched, x: Tensor) -> tuple[Block, list[Tensor]] | None:
    """The block under the route in force and its factors; None where it must run as it is."""
    groups = matched.parts.linears
    members = [[m for module in group if (m := member_in_force(module))] for group in groups]
    if [len(group) for group in members] != [len(group) for group in groups]:
        return None
    if any(_has_hooks(module) for module in matched.inner) or _trains_norms(matched):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    formula = matched.block(members)
    if formula is None or not any(t.requires_grad for t in (x, *formula[1])):
        return None
    return formula


def _trains_norms(matched: Matched) -> bool:
    return any(
        hasattr(norm, "adapters") or any(p.requires_grad for p in norm.parameters())
        for norm in matched.parts.norms
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
