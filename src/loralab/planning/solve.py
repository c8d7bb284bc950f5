"""The largest batch, length or rank that still fits."""

from collections.abc import Callable
from typing import Literal

from loralab.config import RunConfig
from loralab.planning.plan import Plan, Planner

Quantity = Literal["batch_size", "max_tokens", "rank"]

SETTINGS: dict[Quantity, str] = {
    "batch_size": "training__batch_size",
    "max_tokens": "data__max_tokens",
    "rank": "method__rank",
}
MOST: dict[Quantity, int] = {"batch_size": 1 << 16, "max_tokens": 1 << 20, "rank": 1 << 14}


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
    room = 0

    def fits(value: int) -> bool:
        nonlocal room
        if value not in needs:
            made = plan(value)
            needs[value], room = made.needed_bytes, made.usable_bytes
        return needs[value] <= room

    low, high = 0, limit + 1  # low fits (or is nothing), high does not (or is out of bounds)
    guess = min(start, limit)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if fits(guess) else (low, guess)
        guess = _secant(needs, room, low, high)
    return low


def _secant(needs: dict[int, int], room: int, low: int, high: int) -> int:
    """Where the line through the two values nearest to the border meets the room."""
    below = sorted(needs, key=lambda value: abs(needs[value] - room))[:2]
    if len(below) < 2:
        only = below[0]
        return 1 if needs[only] > room else 2 * only
    (x1, y1), (x2, y2) = ((value, needs[value]) for value in below)
    if y1 == y2:
        return 2 * low if low else (low + high) // 2
    crossing = x1 + (room - y1) * (x2 - x1) / (y2 - y1)
    # Just inside, so that the next question closes the bracket from one side.
    return int(crossing) if int(crossing) > low else low + 1


def _present(config: RunConfig, quantity: Quantity) -> int:
    section, key = SETTINGS[quantity].split("__")
    return getattr(getattr(config, section), key)


def _longest(planner: Planner, config: RunConfig) -> int:
    """How many tokens the model itself can take."""
    return planner.position_limit(config) or MOST["max_tokens"]
