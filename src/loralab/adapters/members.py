"""Which linear layers the training step of `step` serves, and what it needs to know of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.items import Pair, weight_norm
from loralab.adapters.layers import Path, path_of
from loralab.adapters.routes import Mix, Route, route_in_force
from loralab.adapters.step import EVERY_ROW, Part, SharedInput

_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True)
class Use:
    """A pair that some of the rows gain. scale: the pair's, times its weight in the route."""

    name: str
    pair: Pair
    scale: float
    rows: slice = field(default_factory=lambda: EVERY_ROW)


@dataclass(frozen=True)
class Member:
    """A frozen linear layer and what its output gains; weight: (out, in)."""

    weight: Tensor
    bias: Tensor | None
    uses: tuple[Use, ...] = ()


def base_member(module: nn.Module) -> Member | None:
    """The module without its adapters as a member, where it is a plain frozen linear layer."""
    return member_of(module, ())


def member_of(module: nn.Module, mix: Mix) -> Member | None:
    """The module as a member, where it is a plain frozen linear layer with at most one plain pair.

    mix: the part of the route that the module hosts. None for everything else: DoRA, trained
    biases, several adapters at once, layers with a forward of their own (quantised ones), a base
    that trains.
    """
    return None if len(mix) > 1 else _member(module, [(name, w, EVERY_ROW) for name, w in mix])


def member_by_rows(module: nn.Module, route: Route) -> Member | None:
    """The module as a member whose rows use different adapters, each a stretch of rows."""
    bank: Any = module.adapters
    groups = [(name, group) for name, group in route.groups.items() if name in bank._modules]
    uses = [(n, g.weight, g.span) for n, g in groups if g.span is not None and g.weight is not None]
    starts = sorted((rows.start, rows.stop) for _, _, rows in uses)
    apart = all(before[1] <= after[0] for before, after in itertools.pairwise(starts))
    return _member(module, uses) if apart and len(uses) == len(groups) else None


def decomposed_member(module: nn.Module, mix: Mix) -> Member | None:
    """The module as a member whose pair has a magnitude (DoRA), where all else is plain and the
    adapter has its full weight. Its step is `low_rank_step`, and what `decompose` makes of that."""
    if len(mix) != 1 or mix[0][1] != 1:
        return None
    item = cast(Any, module).adapters.get(mix[0][0])
    if not isinstance(item, Pair) or item.magnitude is None or item.bias is not None:
        return None
    layer = _frozen_layer(module)
    return layer and replace(layer, uses=(Use(mix[0][0], item, item.scale),))


def _member(module: nn.Module, uses: Sequence[tuple[str, float, slice]]) -> Member | None:
    layer = _frozen_layer(module)
    if layer is None:
        return None
    found = []
    for name, route_weight, rows in uses:
        item = cast(Any, module).adapters.get(name)
        if not isinstance(item, Pair) or item.magnitude is not None or item.bias is not None:
            return None
        found.append(Use(name, item, item.scale * route_weight, rows))
    return replace(layer, uses=tuple(found))


def _frozen_layer(module: nn.Module) -> Member | None:
    """The module without its adapters, where it is a frozen linear layer that computes plainly."""
    base = getattr(module, "base_class", type(module))
    if base.forward not in _PLAIN_FORWARDS:
        return None
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return Member(cast(Path, path_of(module)).matrix(module), bias)


def decompose(y: Float[Tensor, "*rows out"], member: Member) -> Float[Tensor, "*rows out"]:
    """`m / ||W + s B A|| y + b` for `y = W x + s B A x` (2402.09353, equation 5; the norm is a
    constant in the gradient)."""
    (use,) = member.uses
    norm = weight_norm(member.weight, *use.pair.factors(), use.pair.scale)
    decomposed = y * (cast(Tensor, use.pair.magnitude) / norm).to(y.dtype)
    return decomposed if member.bias is None else decomposed + member.bias


def member_in_force(module: nn.Module) -> Member | None:
    """The module as a member under the route in force, None where that is not for the step."""
    bank = getattr(module, "adapters", None) if hasattr(module, "base_class") else None
    if bank is None:
        return base_member(module)
    route = route_in_force(bank.host)
    if not isinstance(route, Route):
        return None
    if route.is_mixed:
        return member_by_rows(module, route) if route.packed is not None else None
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

    None where the dropouts of an adapter's pairs differ.
    """
    parts, factors = [], []
    for name in dict.fromkeys(use.name for member in members for use in member.uses):
        own = [next((use for use in m.uses if use.name == name), None) for m in members]
        uses = [use for use in own if use is not None]
        dropouts = {use.pair.dropout if use.pair.training else 0.0 for use in uses}
        if len(dropouts) > 1:
            return None
        dropout = dropouts.pop()
        scales = tuple(None if use is None else use.scale / (1 - dropout) for use in own)
        parts.append(Part(scales, dropout, name, uses[0].rows))
        factors += [factor for use in uses for factor in use.pair.factors()]
    shared = SharedInput(
        weights=tuple(member.weight for member in members),
        biases=tuple(member.bias for member in members),
        parts=tuple(parts),
    )
    return shared, factors
