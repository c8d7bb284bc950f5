"""Who uses which adapter: a route, in force for one thread or task, read at every forward.

The routes in force live in a context variable: private to the thread or task that opened them,
gone when the `with` closes. What runs later or elsewhere on behalf of a forward (another thread,
activation checkpointing's second forward) must be given them: `carry`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.utils.checkpoint
from jaxtyping import Int
from torch import Tensor

from loralab.errors import RouteError, nearest
from loralab.placement import send

Mix = tuple[tuple[str, float], ...]  # (adapter, weight); () is the base alone
Entry = str | Mapping[str, float | int] | None


@dataclass(frozen=True)
class Group:
    """The rows that use one adapter, with the weight of each."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @functools.cached_property
    def span(self) -> slice | None:
        """The rows as a slice where they follow each other, so that taking them copies nothing."""
        first, last = self.rows[0], self.rows[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else None

    @functools.cached_property
    def weight(self) -> float | None:
        """The one weight of all rows, where it is one."""
        return self.weights[0] if len(set(self.weights)) == 1 else None


@dataclass(frozen=True)
class Route:
    """`mixes` holds one mix for the whole batch (`num_rows` None) or one a row.

    packed: (rows, tokens) of a batch whose mixes are one a token, row after row.
    """

    mixes: tuple[Mix, ...]
    num_rows: int | None
    packed: tuple[int, int] | None = None
    _indices: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def is_mixed(self) -> bool:
        """Whether rows differ in what they use."""
        return len(set(self.mixes)) > 1

    @functools.cached_property
    def groups(self) -> dict[str, Group]:
        """Each adapter's rows, for a route by row."""
        rows: dict[str, tuple[list[int], list[float]]] = {}
        for row, mix in enumerate(self.mixes):
            for name, weight in mix:
                indices, weights = rows.setdefault(name, ([], []))
                indices.append(row)
                weights.append(weight)
        return {name: Group(tuple(i), tuple(w)) for name, (i, w) in rows.items()}

    @functools.cached_property
    def rows_of_mix(self) -> dict[Mix, tuple[int, ...]]:
        """The rows that share a mix, for modules that are run once for each."""
        rows: dict[Mix, list[int]] = {}
        for row, mix in enumerate(self.mixes):
            rows.setdefault(mix, []).append(row)
        return {mix: tuple(indices) for mix, indices in rows.items()}

    @functools.cached_property
    def stretches(self) -> tuple[tuple[slice, Mix], ...]:
        """Rows that follow each other with their mix, where each mix has one stretch; else ()."""
        ends = [rows[-1] + 1 for rows in self.rows_of_mix.values()]
        found = tuple(
            (slice(rows[0], end), mix)
            for (mix, rows), end in zip(self.rows_of_mix.items(), ends, strict=True)
        )
        whole = all(rows.stop - rows.start == len(self.rows_of_mix[mix]) for rows, mix in found)
        return found if whole else ()

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The adapters that any row uses."""
        return frozenset(name for mix in set(self.mixes) for name, _ in mix)

    def index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Row numbers as a tensor on the device, made once."""
        return self._made_once(rows, device, torch.int64)

    def coefficients(self, group: Group, like: Tensor) -> Tensor:
        """The weights of a group's rows, shaped to scale `like` row by row; made once."""
        weights = self._made_once(group.weights, like.device, like.dtype)
        return weights.view(-1, *(1 for _ in like.shape[1:]))

    def _made_once(self, values: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (id(values), device, dtype)  # hashing thousands of numbers costs more than a look
        if key not in self._indices:  # the values are kept, so that no others take their id
            self._indices[key] = values, send(torch.tensor(values, dtype=dtype), device)
        return self._indices[key][1]


@dataclass(frozen=True)
class Probe:
    """In the place of a route: modules run as the base and note the shapes of their inputs."""

    seen: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)

    def note(self, path: str, x: Any) -> None:
        if isinstance(x, Tensor):
            self.seen.setdefault(path, []).append(tuple(x.shape))


_NONE: Mapping[object, Route | Probe] = MappingProxyType({})
_in_force: ContextVar[Mapping[object, Route | Probe]] = ContextVar("routes in force", default=_NONE)


def route_in_force(host: object) -> Route | Probe | None:
    """The route this thread or task has opened for the model with that host."""
    return _in_force.get().get(host)


@contextmanager
def in_force(host: object, route: Route | Probe) -> Iterator[None]:
    """Puts a route in force for the model with that host; the one before is back afterwards."""
    token = _in_force.set({**_in_force.get(), host: route})
    try:
        yield
    finally:
        _in_force.reset(token)


def carry(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, bound to the routes in force now: for another thread, or for a later call."""
    routes = _in_force.get()

    @functools.wraps(function, updated=())
    def carried(*args: Any, **kwargs: Any) -> Any:
        token = _in_force.set(routes)
        try:
            return function(*args, **kwargs)
        finally:
            _in_force.reset(token)

    return carried


def make_route(route: Entry | Sequence[Entry], hosted: Sequence[str]) -> Route:
    """What `use` was given, as a `Route`. Raises `RouteError` that lists every fault."""
    by_row = isinstance(route, Sequence) and not isinstance(route, str)
    entries: list[Any] = list(cast(Sequence[Entry], route)) if by_row else [route]
    faults: dict[str, None] = {}
    if by_row and not entries:
        faults["the list of rows is empty"] = None
    mixes = tuple(_mix(entry, hosted, faults) for entry in entries)
    if faults:
        raise RouteError(
            "route: " + "; ".join(faults),
            "give an attached adapter's name, None for the base, {name: weight}, or a list of"
            " these with one entry a row.",
        )
    return Route(mixes, len(entries) if by_row else None)


def pack(route: Route, segments: Int[Tensor, "rows tokens"]) -> Route:
    """The route of a packed batch: each token uses the entry of that number, below 0 the base.

    Raises `RouteError` for numbers that no entry has, and for a route without a list of entries.
    """
    last = int(segments.max()) if segments.numel() else 0
    if route.num_rows is None or last >= route.num_rows:
        have = "no list of entries" if route.num_rows is None else f"{route.num_rows} entries"
        raise RouteError(
            f"route: there are {have}, but segments are numbered up to {last}",
            "give a list with one entry a segment, and each token its entry's number from 0.",
        )
    mixes = (*route.mixes, ())
    numbers = segments.clamp_min(-1).flatten().tolist()
    rows, tokens = segments.shape
    return Route(tuple(mixes[number] for number in numbers), len(numbers), (rows, tokens))


def _mix(entry: Any, hosted: Sequence[str], faults: dict[str, None]) -> Mix:
    if entry is None:
        return ()
    weights = {entry: 1.0} if isinstance(entry, str) else entry
    if not isinstance(weights, Mapping):
        faults[f"{entry!r} is neither a name, nor None, nor a mapping of weights"] = None
        return ()
    for name, weight in weights.items():
        if name not in hosted:
            hint = nearest(str(name), hosted) if hosted else "the model hosts no adapter"
            faults[f"no adapter {name!r} is attached ({hint})"] = None
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            faults[f"the weight of {name!r} is {weight!r}, not a finite number"] = None
    return tuple((str(name), float(weight)) for name, weight in weights.items() if weight != 0)


def _carry_routes_through_checkpointing() -> None:
    """Makes activation checkpointing run its second forward under the first one's routes.

    The second forward runs inside backward, when the `with` may have closed or another may be
    open, and `torch.utils.checkpoint` offers no way to hand a context over from outside the call.
    So both of its implementations get their function bound at the first forward.
    """
    module: Any = torch.utils.checkpoint
    reentrant = module.CheckpointFunction.forward
    without_reentrant = module._checkpoint_without_reentrant_generator

    @functools.wraps(reentrant)
    def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return reentrant(ctx, carry(run_function), *args)

    @functools.wraps(without_reentrant)
    def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return without_reentrant(carry(fn), *args, **kwargs)

    module.CheckpointFunction.forward = staticmethod(forward)
    module._checkpoint_without_reentrant_generator = generator


_carry_routes_through_checkpointing()
