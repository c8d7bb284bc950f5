"""Opening a route on a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Int
from torch import Tensor, nn

from loralab.adapters.hosting import host_of
from loralab.adapters.routes import Entry, Route, in_force, make_route, pack
from loralab.errors import RouteError


def hosted(model: nn.Module) -> tuple[str, ...]:
    """Names of the attached adapters, in the order of attachment."""
    host = host_of(model)
    return tuple(host.configs) if host else ()


@contextmanager
def use(
    model: nn.Module,
    route: Entry | Sequence[Entry],
    *,
    segments: Int[Tensor, "rows tokens"] | None = None,
) -> Iterator[None]:
    """Puts a route in force for forwards of this thread or task inside the `with`.

    route: an adapter's name, None (the base), {name: weight} (a mix, deltas add up), or a list of
        these with one entry a row of the batch.
    segments: for packed rows, the number of the entry that each token uses (below 0: the base). The
        model itself keeps segments apart, by its mask and positions.

    Raises `RouteError` for unknown names at once, and at the forward where rows cannot be told
    apart.
    """
    host = host_of(model)
    made = make_route(route, tuple(host.configs) if host else ())
    if segments is not None:
        made = pack(made, segments)
    if host is None:
        yield
        return
    with in_force(host, _without_merged(model, made)):
        yield


def merged_name(model: nn.Module) -> str | None:
    """The adapter that `merge_in_place` has put into this model's weights."""
    return model.__dict__.get("_loralab_merged", (None,))[0]


def _without_merged(model: nn.Module, route: Route) -> Route:
    """The route; an adapter that is in the weights already adds nothing more to them."""
    merged = merged_name(model)
    if merged is None:
        return route
    if route.num_rows is None and route.mixes == (((merged, 1.0),),):
        return Route(((),), None)
    raise RouteError(
        f"adapter {merged!r} is merged into this model: it serves no other route",
        "call `loralab.restore(model)` first.",
    )
