"""Following a route inside `torch.compile`: the route reaches the kernels as a tensor.

Which adapter a row uses must not be part of what is compiled. So an opaque operator reads the route
when the compiled code runs, and gives one weight for each row and each adapter that the module
hosts; all of them are computed and weighted. Any route then runs the same code.
"""

import itertools
from collections.abc import Callable
from typing import Any, cast, no_type_check
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from loralab.adapters.items import as_addition
from loralab.adapters.layers import Path, path_of
from loralab.adapters.routes import Route, route_in_force
from loralab.errors import RouteError

_banks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(bank: Any) -> Tensor:
    """A number under which compiled code finds the bank again.

    A tensor, so that it is an input: modules that differ in nothing else share their code.
    """
    number = next(_numbers)
    _banks[number] = bank
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("loralab::row_weights", mutates_args=())
def row_weights(x: Tensor, bank: Tensor, names: str, training: bool) -> Tensor:
    """(rows, adapters) weights of the route in force for the calling thread, or (1, adapters)."""
    hosting = _banks[int(bank)]
    known = names.split("/")
    route = route_in_force(hosting.host)
    if not isinstance(route, Route):
        if training:
            raise RouteError(
                f"a compiled training forward reached {hosting.path!r} with no route",
                f'run it inside `with loralab.use(model, "{known[0]}"):`.',
            )
        return torch.zeros(x.shape[0], len(known), device=x.device)
    if route.is_mixed and route.num_rows != x.shape[0]:
        raise RouteError(
            f"module {hosting.path!r} was given an input of shape {tuple(x.shape)}, whose first"
            f" dimension is not the {route.num_rows} rows of the route",
            "use one adapter for the whole batch, or leave the module out with `exclude`.",
        )
    table = [[dict(mix).get(name, 0.0) for name in known] for mix in route.mixes]
    weights = torch.tensor(table, device=x.device)
    return weights if route.is_mixed else weights[:1].expand(x.shape[0], -1).contiguous()


@row_weights.register_fake
def _(x: Tensor, bank: Tensor, names: str, training: bool) -> Tensor:
    return x.new_empty(x.shape[0], len(names.split("/")), dtype=torch.float32)


@no_type_check
def follow_compiled(
    module: nn.Module,
    bank: Any,
    base: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's output, with every adapter that it hosts weighted by the route."""
    x = args[0] if args else next(iter(kwargs.values()))
    y = base(*args, **kwargs)
    names = list(bank._modules)
    training = module.training and torch.is_grad_enabled()
    weights = row_weights(x.detach(), bank.number, "/".join(names), training).to(y.dtype)
    added = y
    for column, name in enumerate(names):
        item = as_addition(bank.get(name))
        weight = weights[:, column].view(-1, *(1 for _ in y.shape[1:]))
        if item is None:
            change = bank.get(name)(*args, **kwargs) - y
            added = added + torch.where(weight == 0, 0, weight * change)
        else:
            added = added + item.delta(module, cast(Path, path_of(module)), x, y, weight)
    return added
