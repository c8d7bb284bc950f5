"""How a hosting module follows a route: which rows get what of which adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.adapters import attention
from loralab.adapters.convolution_step import convolution_of, convolution_step, takes
from loralab.adapters.doubles import double, plain_tensors
from loralab.adapters.items import as_addition, is_additive, replacements
from loralab.adapters.layers import Path, path_of
from loralab.adapters.members import (
    decompose,
    decomposed_member,
    fits,
    member_by_rows,
    member_of,
    share,
)
from loralab.adapters.routes import Mix, Probe, Route
from loralab.adapters.rows import move_rows_first, row_dimension
from loralab.adapters.step import low_rank_step
from loralab.errors import RouteError
from loralab.placement import send

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
    if torch.is_grad_enabled() and route.stretches and _steps_by_stretch(module, mixes, x):
        y = torch.cat(
            [
                run(module, bank, mixes[mix], base, (x[rows],), {}) if mixes[mix] else base(x[rows])
                for rows, mix in route.stretches
            ]
        )
    elif all(is_additive(bank.get(name)) for mix in mixes.values() for name, _ in mix):
        y = _add_by_row(module, bank, route, x, move_rows_first(base(*args, **kwargs), dimension))
    else:
        y = _run_by_mix(module, bank, route, mixes, base, x)
    return move_rows_first(y, dimension)


def _steps_by_stretch(module: nn.Module, mixes: dict[Mix, Mix], x: Tensor) -> bool:
    """Whether rows that share a mix run through the training step of a convolution."""
    found = [convolution_of(module, mix) for mix in mixes.values() if mix]
    return all(each is not None and takes(each[0], x) for each in found)


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
    member = decomposed_member(module, mix)
    if member is not None and fits(member, input_of(args, kwargs)):
        x, unbiased = input_of(args, kwargs), replace(member, bias=None)
        return decompose(low_rank_step(x, *cast(Any, share([unbiased])))[0], member)
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
    """A module's tensors in a mix: the base's plus the weighted deltas, in the base's dtype.

    Of a head whose size is not the base's, the weighted sum. Raises `RouteError` for a mix of heads
    of several sizes.
    """
    base = plain_tensors(module)
    usual = next(iter(base.values())).dtype
    dtypes = {name: tensor.dtype for name, tensor in base.items()}
    if len(items) == 1 and items[0][1] == 1:  # the tensors themselves: norm statistics are updated
        own = replacements(items[0][0])
        return {name: own[name].to(dtypes.get(name, usual)) for name in own}
    mixed = dict(base)
    for item, weight in items:
        for name, own in replacements(item).items():
            if not own.is_floating_point():
                continue
            first = base.get(name)
            if first is None or first.shape != own.shape:
                if name not in mixed or mixed[name] is first:
                    mixed[name] = torch.zeros_like(own, dtype=dtypes.get(name, usual))
                first = torch.zeros_like(own)
            if mixed[name].shape != own.shape:
                raise RouteError(
                    f"the adapters of a mix have heads of several sizes ({name} is "
                    f"{tuple(mixed[name].shape)} and {tuple(own.shape)})",
                    "mix adapters that tell the same classes apart.",
                )
            mixed[name] = mixed[name] + (weight * (own - first)).to(mixed[name].dtype)
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
    """Runs the module once for each distinct mix, on the rows that share it.

    Where their heads make several numbers of outputs, zeros fill up the others' rows.
    """
    outputs: list[Tensor] = []
    order: list[int] = []
    for mix, rows in route.rows_of_mix.items():
        taken = x.index_select(0, route.index(rows, x.device))
        mine = mixes[mix]
        outputs.append(run(module, bank, mine, base, (taken,), {}) if mine else base(taken))
        order.extend(rows)
    widest = max(y.shape[-1] for y in outputs)
    if any(y.shape[-1] < widest for y in outputs):  # heads of several sizes
        outputs = [F.pad(y, (0, widest - y.shape[-1])) for y in outputs]
    return torch.cat(outputs).index_select(0, send(torch.tensor(order).argsort(), x.device))
