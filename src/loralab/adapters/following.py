"""How a hosting module follows a route: which rows get what of which adapter."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.adapters import attention
from loralab.adapters.convolution_step import convolution_of, convolution_step, takes
from loralab.adapters.doubles import double, plain_tensors
from loralab.adapters.items import as_addition, is_additive, replacements
from loralab.adapters.layers import Path, path_of
from loralab.adapters.members import fits, member_by_rows, member_of, share
from loralab.adapters.routes import Mix, Probe, Route
from loralab.adapters.rows import move_rows_first, row_dimension
from loralab.adapters.step import low_rank_step
from loralab.errors import RouteError

Forward = Callable[..., Any]


def follow(
    module: nn.Module,
    bank: Any,
    route: Route | Probe,
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's output under the route. Raises `RouteError` where rows cannot be told apart."""
    if isinstance(route, Probe):
        route.note(bank.path, input_of(args, kwargs))
        return base(*args, **kwargs)
    if not route.is_mixed:
        mix = present(module, bank, route.mixes[0])
        return run(module, bank, mix, base, args, kwargs) if mix else base(*args, **kwargs)
    mixes = {mix: present(module, bank, mix) for mix in route.rows_of_mix}
    if not any(mixes.values()):
        return base(*args, **kwargs)
    if isinstance(module, nn.MultiheadAttention):
        return attention.run_by_mix(module, bank, route, mixes, base, args, kwargs)
    x = input_of(args, kwargs)
    dimension = row_dimension(bank, route, x)
    if len(args) + len(kwargs) > 1 and _extra_tensors(args, kwargs):
        raise RouteError(
            f"module {bank.path!r} takes several inputs, so that its rows cannot be told apart",
            "use one adapter for the whole batch, or leave the module out with `exclude`.",
        )
    x = move_rows_first(x, dimension)
    member = member_by_rows(module, route) if route.packed is not None else None
    if member is not None and fits(member, x):
        return low_rank_step(x, *cast(Any, share([member])))[0]
    if all(is_additive(bank.get(name)) for mix in mixes.values() for name, _ in mix):
        y = _add_by_row(module, bank, route, x, move_rows_first(base(*args, **kwargs), dimension))
    else:
        y = _run_by_mix(module, bank, route, mixes, base, x)
    return move_rows_first(y, dimension)


def run(
    module: nn.Module,
    bank: Any,
    mix: Mix,
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output when all rows use the same mix of adapters, all of which the module hosts."""
    if isinstance(module, nn.MultiheadAttention):
        return attention.run(module, bank, mix, args, kwargs)
    member = member_of(module, mix)
    if member is not None and fits(member, input_of(args, kwargs)):
        return low_rank_step(input_of(args, kwargs), *cast(Any, share([member])))[0]
    convolved = convolution_of(module, mix)
    if convolved is not None and takes(convolved[0], input_of(args, kwargs)):
        return convolution_step(input_of(args, kwargs), convolved[0], *convolved[1].factors())
    replacing = [
        (bank.get(name), weight) for name, weight in mix if not is_additive(bank.get(name))
    ]
    if replacing:
        y = double(module, mixed_tensors(module, replacing))(*args, **kwargs)
    else:
        y = base(*args, **kwargs)
    before = y
    for name, weight in mix:
        item = as_addition(bank.get(name))
        if item is not None:
            x = input_of(args, kwargs)
            y = y + item.delta(module, cast(Path, path_of(module)), x, before, weight)
    return y


def present(module: nn.Module, bank: Any, mix: Mix) -> Mix:
    """The part of a mix that this module hosts."""
    if isinstance(module, nn.MultiheadAttention):
        return attention.present(module, bank, mix)
    return tuple((name, weight) for name, weight in mix if name in bank._modules)


def mixed_tensors(module: nn.Module, items: Sequence[tuple[nn.Module, float]]) -> dict[str, Tensor]:
    """A module's tensors in a mix: the base's plus the weighted deltas, in the base's dtype."""
    base = plain_tensors(module)
    if len(items) == 1 and items[0][1] == 1:  # the tensors themselves: norm statistics are updated
        own = replacements(items[0][0])
        return {name: own[name].to(base[name].dtype) for name in own}
    mixed = dict(base)
    for item, weight in items:
        for name, own in replacements(item).items():
            if own.is_floating_point():
                mixed[name] = mixed[name] + (weight * (own - base[name])).to(base[name].dtype)
    return mixed


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input that the rows are counted in: the first."""
    return args[0] if args else next(iter(kwargs.values()))


def _extra_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return sum(isinstance(value, Tensor) for value in (*args, *kwargs.values())) > 1


def _add_by_row(module: nn.Module, bank: Any, route: Route, x: Tensor, y: Tensor) -> Tensor:
    """Each adapter is applied to its own rows only, so that rows never meet."""
    path = cast(Path, path_of(module))
    base = y
    for name, group in route.groups.items():
        item = as_addition(bank.get(name))
        if item is None:
            continue
        rows = route.index(group.rows, y.device)
        if group.span is None:
            taken, output = x.index_select(0, rows), base.index_select(0, rows)
        else:
            taken, output = x[group.span], base[group.span]
        weight = group.weight
        if weight is None:
            weight = route.coefficients(group, output)
        y = y.index_add(0, rows, item.delta(module, path, taken, output, weight))
    return y


def _run_by_mix(
    module: nn.Module, bank: Any, route: Route, mixes: dict[Mix, Mix], base: Forward, x: Tensor
) -> Tensor:
    """Runs the module once for each distinct mix, on the rows that share it."""
    outputs: list[Tensor] = []
    order: list[int] = []
    for mix, rows in route.rows_of_mix.items():
        taken = x.index_select(0, route.index(rows, x.device))
        mine = mixes[mix]
        outputs.append(run(module, bank, mine, base, (taken,), {}) if mine else base(taken))
        order.extend(rows)
    return torch.cat(outputs).index_select(0, torch.tensor(order, device=x.device).argsort())
