"""Which dimension of a module's input holds the rows of the batch.

It is not always the first: some models flatten tokens, cut windows, or put the sequence first, and
two sizes may be equal by chance. So before a model's first forward under a route by row, its
forward runs once on fake tensors (shapes without numbers) with a number of rows that nothing else
can have, and every hosting module notes where that number turns up.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from loralab.adapters.routes import Probe, Route, in_force, route_in_force
from loralab.adapters.targets import ADAPTERS, walk
from loralab.errors import RouteError, TargetError, nearest

PROBE_ROWS = 10007  # a prime: no other size of a model is this or divides it
PROBE_TOKENS = 10009
NEXT = (
    "give one entry a row of the batch; where this module sees the rows otherwise, use one adapter"
    " for the whole batch, declare the dimension with `declare_rows`, or leave the module out with"
    " `exclude`."
)


def declare_rows(model: nn.Module, dimensions: Mapping[str, int]) -> None:
    """Says which dimension of a module's input (and output) holds the rows of the batch.

    dimensions: suffix of module names -> dimension. Raises `TargetError` for a suffix that means
    no module that hosts an adapter.
    """
    hosting = {name: module for name, module in walk(model) if ADAPTERS in module._modules}
    faults = []
    for suffix, dimension in dimensions.items():
        found = [name for name in hosting if name == suffix or name.endswith("." + suffix)]
        for name in found:
            bank: Any = hosting[name]._modules[ADAPTERS]
            bank.host.row_dimensions[name] = dimension
        if not found:
            faults.append(f"{suffix!r} means no module with an adapter; {nearest(suffix, hosting)}")
    if faults:
        raise TargetError("; ".join(faults), "name modules that host an adapter.")


def row_dimension(bank: Any, route: Route, x: Any) -> int:
    """The dimension of `x` that holds the rows. Raises `RouteError` where it is not known."""
    if not isinstance(x, Tensor):
        raise RouteError(
            f"module {bank.path!r} was given a {type(x).__name__} for its first input", NEXT
        )
    declared = bank.host.row_dimensions.get(bank.path)
    dimension = 0 if declared is None else declared
    shape, num_rows = tuple(x.shape), route.num_rows
    if len(shape) <= dimension or shape[dimension] != num_rows:
        raise RouteError(
            f"module {bank.path!r} was given an input of shape {shape}, whose dimension {dimension}"
            f" does not hold the {num_rows} rows of the route",
            NEXT,
        )
    if declared is None and route.packed is None:  # of a packed batch the dimension is known
        seen = bank.host.seen_rows.get(bank.path, "nothing")
        if seen == "nothing" and num_rows in shape[1:]:
            raise RouteError(
                f"module {bank.path!r} was given an input of shape {shape}: which dimension holds"
                f" the {num_rows} rows of the route cannot be told",
                NEXT,
            )
        if seen not in ("nothing", 0):
            where = "not the rows" if seen is None else f"not the rows (dimension {seen} does)"
            raise RouteError(
                f"module {bank.path!r}: the first dimension of its input {shape} holds {where}",
                NEXT,
            )
    return dimension


def move_rows_first(x: Tensor, dimension: int) -> Tensor:
    """The tensor with dimension 0 and the rows' exchanged (its own inverse)."""
    return x.transpose(0, dimension) if dimension else x


@no_type_check
def probe_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a hosting model: looks where the rows are, once a kind of input."""
    if torch.compiler.is_compiling():
        return
    host: Any = module.__dict__["_loralab_host"]
    route = route_in_force(host)
    if not isinstance(route, Route) or not route.is_mixed:
        return
    packed = route.packed is not None
    sizes = route.packed if route.packed is not None else (route.num_rows or 0, None)
    given = sorted(name for name, value in kwargs.items() if value is not None)
    kind = (packed, len(args), *given)
    if kind in host.probed:
        return
    host.probed.add(kind)
    probe = Probe()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    complaints = logging.getLogger("torch._subclasses.fake_tensor")
    was_silent, complaints.disabled = complaints.disabled, True
    try:
        # a preview only: whatever cannot run on fake tensors is judged by its real shapes later
        with torch.no_grad(), in_force(host, probe), mode:
            module.forward(
                *(_with_rows(value, *sizes, mode) for value in args),
                **{key: _with_rows(kwargs[key], *sizes, mode) for key in kwargs},
            )
    except Exception:
        return
    finally:
        complaints.disabled = was_silent
    for path, shapes in probe.seen.items():
        if packed:
            starts = {shape[:2] for shape in shapes}
            host.seen_tokens[path] = starts == {(PROBE_ROWS, PROBE_TOKENS)}
            continue
        places = {shape.index(PROBE_ROWS) if PROBE_ROWS in shape else None for shape in shapes}
        host.seen_rows[path] = places.pop() if len(places) == 1 else None


def _with_rows(value: Any, num_rows: int, num_tokens: int | None, mode: FakeTensorMode) -> Any:
    """The input as a fake, with the probe's numbers of rows (and tokens) where it has them."""
    if isinstance(value, dict):  # masks by kind of layer
        return {key: _with_rows(item, num_rows, num_tokens, mode) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.ndim and value.shape[0] == num_rows:
        with mode:
            places = (1,) if value.ndim < 4 else (1, 2, 3)  # a mask has tokens twice
            rest = (
                PROBE_TOKENS if place in places and size == num_tokens else size
                for place, size in enumerate(value.shape[1:], 1)
            )
            shape = (PROBE_ROWS, *rest)
            return torch.empty(shape, dtype=value.dtype, device=value.device)
    return mode.from_tensor(value)


def declare_tokens(model: nn.Module, path: str) -> None:
    """Says that the modules under `path` are given (rows, tokens, ...) under a packed route."""
    for name, module in walk(model):
        bank: Any = module._modules.get(ADAPTERS)
        if bank is not None and name.startswith(f"{path}."):
            bank.host.seen_tokens[name] = True
