"""nn.MultiheadAttention: its projections are weights without a module of their own.

The packed input projection and the output projection are never called, only their weights are
read. So the module runs once for each mix with the deltas added to these weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.doubles import double, plain_tensors
from loralab.adapters.items import Pair, replacements
from loralab.adapters.routes import Mix, Route
from loralab.errors import RouteError
from loralab.placement import send

OUTPUT = "out_proj"
WEIGHTS = {"": "in_proj_weight", OUTPUT: "out_proj.weight"}


def present(module: nn.MultiheadAttention, bank: Any, mix: Mix) -> Mix:
    """The part of a mix that the module or its output projection hosts."""
    output = _output_bank(module)
    known = set(bank._modules) | set(output._modules if output is not None else ())
    return tuple((name, weight) for name, weight in mix if name in known)


def run(
    module: nn.MultiheadAttention, bank: Any, mix: Mix, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Attention with the mix's deltas in its projections."""
    return double(module, _adapted_tensors(module, bank, mix))(*args, **kwargs)


def run_by_mix(
    module: nn.MultiheadAttention,
    bank: Any,
    route: Route,
    mixes: dict[Mix, Mix],
    base: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Attention once for each distinct mix, on the rows that share it."""
    dimension = 0 if module.batch_first else 1
    query = args[0] if args else kwargs["query"]
    num_rows = route.num_rows or 0
    if query.ndim != 3 or query.shape[dimension] != num_rows:
        raise RouteError(
            f"module {bank.path!r} was given a query of shape {tuple(query.shape)}, whose dimension"
            f" {dimension} does not hold the {num_rows} rows of the route",
            "give one entry a row of the batch, or use one adapter for the whole batch.",
        )
    results, order = [], []
    for mix, rows in route.rows_of_mix.items():
        index = route.index(rows, query.device)
        taken = [
            _take(module, key, value, index, dimension, num_rows)
            for key, value in (*enumerate(args), *kwargs.items())
        ]
        positional = tuple(taken[: len(args)])
        named = dict(zip(kwargs, taken[len(args) :], strict=True))
        mine = mixes[mix]
        if mine:
            results.append(run(module, bank, mine, positional, named))
        else:
            results.append(base(*positional, **named))
        order.extend(rows)
    back = send(torch.tensor(order).argsort(), query.device)
    outputs = torch.cat([output for output, _ in results], dim=dimension)
    outputs = outputs.index_select(dimension, back)
    if any(weights is None for _, weights in results):
        return outputs, None
    return outputs, torch.cat([weights for _, weights in results]).index_select(0, back)


def _take(
    module: nn.MultiheadAttention,
    key: int | str,
    value: Any,
    index: Tensor,
    dimension: int,
    num_rows: int,
) -> Any:
    """The part of one argument of the forward that belongs to these rows."""
    if key in (0, 1, 2, "query", "key", "value"):
        return value.index_select(dimension, index)
    if key in (3, "key_padding_mask") and value is not None:
        return value.index_select(0, index)
    if key in (5, "attn_mask") and value is not None and value.ndim == 3:
        by_row = value.unflatten(0, (num_rows, module.num_heads))
        return by_row.index_select(0, index).flatten(0, 1)
    return value


def _output_bank(module: nn.MultiheadAttention) -> Any:
    return module.out_proj._modules.get("adapters")


def _adapted_tensors(module: nn.MultiheadAttention, bank: Any, mix: Mix) -> dict[str, Tensor]:
    tensors = plain_tensors(module)
    changed = dict(tensors)
    for name, weight in mix:
        for place, hosting in (("", bank), (OUTPUT, _output_bank(module))):
            item = None if hosting is None else hosting.get(name)
            if item is None:
                continue
            if isinstance(item, Pair):
                key = WEIGHTS[place]
                A, B = item.factors()
                delta = ((weight * item.scale * B) @ A).to(tensors[key].dtype)
                changed[key] = changed[key] + delta
            for inner, own in replacements(item).items():
                key = f"{place}.{inner}" if place else inner
                difference = weight * (own - tensors[key])
                changed[key] = changed[key] + difference.to(tensors[key].dtype)
    return changed
