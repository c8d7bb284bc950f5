"""Which linear layers the training step of `step` serves, and what it needs to know of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.items import Pair
from loralab.adapters.layers import Path, path_of
from loralab.adapters.routes import Mix, Route, route_in_force
from loralab.adapters.step import SharedInput

_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True)
class Member:
    """A frozen linear layer and the pair that its output gains, if any.

    weight: (out, in). scale: the pair's, times its weight in the route.
    """

    weight: Tensor
    bias: Tensor | None
    pair: Pair | None
    scale: float


def base_member(module: nn.Module) -> Member | None:
    """The module without its adapters as a member, where it is a plain frozen linear layer."""
    return member_of(module, ())


def member_of(module: nn.Module, mix: Mix) -> Member | None:
    """The module as a member, where it is a plain frozen linear layer with at most one plain pair.

    mix: the part of the route that the module hosts. None for everything else: DoRA, trained
    biases, several adapters at once, layers with a forward of their own (quantised ones), a base
    that trains.
    """
    base = getattr(module, "base_class", type(module))
    if base.forward not in _PLAIN_FORWARDS or len(mix) > 1:
        return None
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    matrix = cast(Path, path_of(module)).matrix(module)
    if not mix:
        return Member(matrix, bias, None, 0.0)
    ((name, route_weight),) = mix
    item = cast(Any, module).adapters.get(name)
    if not isinstance(item, Pair) or item.magnitude is not None or item.bias is not None:
        return None
    return Member(matrix, bias, item, item.scale * route_weight)


def member_in_force(module: nn.Module) -> Member | None:
    """The module as a member under the route in force, None where that is not for the step."""
    bank = getattr(module, "adapters", None) if hasattr(module, "base_class") else None
    if bank is None:
        return base_member(module)
    route = route_in_force(bank.host)
    if not isinstance(route, Route) or route.is_mixed:
        return None
    return member_of(module, tuple((n, w) for n, w in route.mixes[0] if n in bank._modules))


def fits(member: Member, x: Any) -> bool:
    """Whether the step can take `x` (rows and autocasting are the plain formula's business)."""
    return (
        isinstance(x, Tensor)
        and x.ndim >= 2
        and x.dtype == member.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def share(members: Sequence[Member]) -> tuple[SharedInput, list[Tensor]] | None:
    """Members that read the same input as one, and the factors of their pairs.

    None where their dropouts differ.
    """
    pairs = [member.pair for member in members if member.pair is not None]
    dropouts = {pair.dropout if pair.training else 0.0 for pair in pairs}
    if len(dropouts) > 1:
        return None
    dropout = next(iter(dropouts), 0.0)
    shared = SharedInput(
        weights=tuple(member.weight for member in members),
        biases=tuple(member.bias for member in members),
        scales=tuple(m.scale / (1 - dropout) if m.pair is not None else None for m in members),
        dropout=dropout,
    )
    return shared, [factor for pair in pairs for factor in pair.factors()]
