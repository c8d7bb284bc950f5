"""Packed batches: several segments in one row of tokens, each with an adapter of its own.

A module that treats every token alike sees the tokens of all rows as so many rows; so a packed
route is a route by token. Modules that look at several tokens at once keep segments apart by the
model's own mask and positions, and host nothing under such a route.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.following import follow, input_of
from loralab.adapters.routes import Route
from loralab.errors import RouteError

TOKENWISE = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
NORMS = ("RMSNorm", "LayerNorm")  # what classes of norms over the features are called


def follow_packed(
    module: nn.Module,
    bank: Any,
    route: Route,
    base: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's output under a packed route.

    Raises `RouteError` that names the module where it does not treat each token by itself, or where
    its input is not (rows, tokens, ...).
    """
    if not route.is_mixed or not (_hosted(module, bank) & route.names):
        return follow(module, bank, route, base, args, kwargs)
    x = input_of(args, kwargs)
    tokens = _tokens_of(module, bank, route, x)
    if len(args) + len(kwargs) > 1:
        raise _cannot(bank, "takes several inputs")
    return follow(module, bank, route, base, (tokens,), {}).unflatten(0, route.packed)


def _hosted(module: nn.Module, bank: Any) -> set[str]:
    names = set(bank._modules)
    if isinstance(module, nn.MultiheadAttention):  # it applies its output projection's too
        output = module.out_proj._modules.get("adapters")
        names |= set(output._modules if output is not None else ())
    return names


def _tokens_of(module: nn.Module, bank: Any, route: Route, x: Any) -> Tensor:
    """The module's input with the tokens of all rows in its first dimension."""
    kind = type(module).__name__
    if not isinstance(module, TOKENWISE) and not kind.endswith(NORMS):
        raise _cannot(bank, f"is a {kind}, which may look at several tokens at once")
    features = 0 if isinstance(module, nn.Embedding) else 1
    shape = tuple(x.shape) if isinstance(x, Tensor) else ()
    rows, tokens = route.packed or (0, 0)
    seen = bank.host.seen_tokens.get(bank.path, tokens not in shape[2:])
    fits = shape[:2] == route.packed and len(shape) >= 2 + features
    if not fits or not seen or bank.path in bank.host.row_dimensions:
        raise _cannot(bank, f"was given {shape}, not {rows} rows of {tokens} tokens")
    return x.flatten(0, 1)


def _cannot(bank: Any, why: str) -> RouteError:
    return RouteError(
        f"module {bank.path!r} {why}: its segments cannot be told apart",
        "leave the module out with `exclude`, or do not pack rows of different adapters.",
    )
