"""The largest batch, length or rank that still fits."""

from collections.abc import Callable
from itertools import count
from typing import Literal

from loralab.config import RunConfig
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
    in a few traces; its answer, and that one more does not fit, are traced themselves.
    """
    limit = MOST[quantity]
    if quantity == "max_tokens":
        limit = min(limit, _longest(planner, config))

    def plan(value: int) -> Plan:
        return planner.plan(config.replace(**{SETTINGS[quantity]: value}), quick=True)

    return _largest(plan, limit, start=_present(config, quantity))


def _largest(plan: Callable[[int], Plan], limit: int, start: int) -> int:
    """The largest value in 1..limit whose plan fits; plans need more the larger the value."""
    needs: dict[int, int] = {}
    room = plan(min(start, limit)).usable_bytes

    def fits(value: int) -> bool:
        needs[value] = plan(value).needed_bytes
        return needs[value] <= room

    low, high = 0, limit + 1  # low fits (or is nothing), high does not (or is out of bounds)
    guess = min(start, limit)
    for turn in count():
        if fits(guess):
            low = guess
        else:
            high = guess
        if high - low <= 1:
            return low
        # Now and then in the middle: a peak that bends can fool the line.
        middle = (low + high) // 2 if high <= limit else min(2 * low, limit)
        guess = middle if turn % 4 == 3 else _crossing(needs, room, low, high, middle)
        guess = min(max(guess, low + 1), high - 1)
    raise AssertionError("unreachable: the bracket shrinks at every turn")


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
