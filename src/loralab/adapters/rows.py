"""Which dimension of a module's input holds the rows of the batch.

It is not always the first: some models flatten tokens, cut windows, or put the sequence first. A
module takes a route by row only where the answer is known or declared.
"""

from typing import Any

from torch import Tensor, nn

from loralab.adapters.routes import Route
from loralab.errors import RouteError


def row_dimension(module: nn.Module, bank: Any, route: Route, x: Any) -> int:
    """The dimension of `x` that holds the rows. Raises `RouteError` where it is not known."""
    num_rows = route.num_rows or 0
    declared = bank.host.row_dimensions.get(bank.path)
    dimension = 0 if declared is None else declared
    if not isinstance(x, Tensor) or x.ndim <= dimension or x.shape[dimension] != num_rows:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise RouteError(
            f"module {bank.path!r} was given an input of shape {shape}, whose dimension {dimension}"
            f" does not hold the {num_rows} rows of the route",
            "give one entry a row of the batch; where this module sees the rows otherwise, use one"
            " adapter for the whole batch, declare its dimension with `declare_rows`, or leave the"
            " module out with `exclude`.",
        )
    return dimension


def move_rows_first(x: Tensor, dimension: int) -> Tensor:
    """The tensor with dimension 0 and the rows' exchanged (its own inverse)."""
    return x.transpose(0, dimension) if dimension else x
