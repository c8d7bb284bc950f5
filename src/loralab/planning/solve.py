"""The largest batch, length or rank that still fits."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Literal

from loralab.config import RunConfig
from loralab.planning.accounts import LIBRARIES
from loralab.planning.plan import Plan, Planner

Quantity = Literal["batch_size", "max_tokens", "rank"]

SETTINGS: dict[Quantity, str] = {
    "batch_size": "training__batch_size",
    "max_tokens": "data__max_tokens",
    "rank": "method__rank",
}
# No more is looked for: nobody asks, and what fits then is limited by other things.
MOST: dict[Quantity, int] = {"batch_size": 1024, "max_tokens": 1 << 17, "rank": 4096}


def largest(planner: Planner, config: RunConfig, quantity: Quantity) -> int:
    """The largest value of a setting with which `config` fits the planner's device; 0 for none.

    The peak is a piecewise straight or convex line in each of them, so a secant finds the place
    in a few quick plans; its answer, and that one more does not fit, are planned themselves. A
    batch is the answer of whole plans, as `Plan.fits` gives them; rows and ranks of quick ones.
    """
    limit = MOST[quantity]
    if quantity == "max_tokens":
        limit = min(limit, _longest(planner, config))

    def plan(value: int, *, quick: bool = True) -> Plan:
        return planner.plan(config.replace(**{SETTINGS[quantity]: value}), quick=quick)

    found = _largest(plan, limit, start=_present(config, quantity))
    if quantity == "batch_size" and found:
        return _largest(partial(plan, quick=False), limit, start=found, is_near=True)
    return found


def _largest(plan: Callable[[int], Plan], limit: int, start: int, *, is_near: bool = False) -> int:
    """The largest value in 1..limit whose plan fits; plans need more the larger the value.

    is_near: `start` is likely it, so that its neighbours are looked at first.
    """
    start = min(start, limit)
    first = plan(start)
    room = first.usable_bytes
    # A first line, through what the plan takes to be there whatever the value.
    needs = {0: first.needed_bytes - round(_growing_bytes(first) * (1 + first.error_bar))}

    def fits(value: int) -> bool:
        needs[value] = plan(value).needed_bytes
        if len(needs) > 2:
            needs.pop(0, None)
        return needs[value] <= room

    low, high = 0, limit + 1  # low fits (or is nothing), high does not (or is out of bounds)
    guess = start
    for turn in count():
        if fits(guess):
            low = guess
        else:
            high = guess
        if high - low <= 1:
            return low
        # Now and then in the middle: a peak that bends can fool the line.
        middle = (low + high) // 2 if high <= limit else min(2 * low, limit)
        if is_near and turn == 0:
            guess = start + (1 if low else -1)
        else:
            guess = middle if turn % 4 == 3 else _crossing(needs, room, low, high, middle)
        guess = min(max(guess, low + 1), high - 1)
    raise AssertionError("unreachable: the bracket shrinks at every turn")


_FIXED = ("weights", "adapters", "gradients", "optimiser states", "master weights", LIBRARIES)


def _growing_bytes(plan: Plan) -> int:
    """Of the peak, what is about proportional to batch and length."""
    return plan.peak_bytes - sum(plan.parts.get(kind, 0) for kind in _FIXED)


def _crossing(needs: dict[int, int], room: int, low: int, high: int, otherwise: int) -> int:
    """Where the line through the two values nearest to the border meets it, on the side that is
    not known yet."""
    (x1, y1), (x2, y2) = (sorted(needs.items(), key=lambda item: abs(item[1] - room)) * 2)[:2]
    if len(needs) < 2 or y1 == y2:
        return otherwise
    crossing = int(x1 + (room - y1) * (x2 - x1) / (y2 - y1))
    return crossing + 1 if crossing <= low else min(crossing, high - 1)


def _present(config: RunConfig, quantity: Quantity) -> int:
    section, key = SETTINGS[quantity].split("__")
    return getattr(getattr(config, section), key)


def _longest(planner: Planner, config: RunConfig) -> int:
    """How many tokens the model itself can take."""
    return planner.position_limit(config) or MOST["max_tokens"]
