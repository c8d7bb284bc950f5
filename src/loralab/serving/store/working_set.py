"""How many slots the traffic needs: the requests' own trace, replayed with other numbers."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

MIN_REQUESTS = 50  # fewer say nothing
GOOD_HIT_RATE = 0.9
NEAR = 0.9  # of the slots in use: the cliff is next


@dataclass(frozen=True)
class Report:
    """What the last requests for adapters would have hit with so many slots.

    num_distinct: different adapters among them.
    hit_rates: slots -> share of requests that find theirs in one; the least recently used goes.
    warning: "" where all is well.
    """

    num_requests: int
    num_distinct: int
    num_slots: int
    hit_rates: dict[int, float]
    warning: str


class WorkingSet:
    """The adapters of the last requests, in their order."""

    def __init__(self, num_requests: int = 2000) -> None:
        self._trace: deque[str] = deque(maxlen=num_requests)
        self._lock = threading.Lock()

    def note(self, names: Iterable[str]) -> None:
        """One request used these adapters."""
        with self._lock:
            self._trace.extend(names)

    def report(self, num_slots: int) -> Report:
        """The trace against a number of slots, and against others."""
        with self._lock:
            trace = list(self._trace)
        distinct = len(set(trace))
        sizes = sorted({num_slots, *(2**i for i in range(11) if 2**i <= 2 * max(distinct, 1))})
        rates = hit_rates(trace, sizes)
        return Report(
            num_requests=len(trace),
            num_distinct=distinct,
            num_slots=num_slots,
            hit_rates=rates,
            warning=_warning(len(trace), distinct, num_slots, rates),
        )


def hit_rates(trace: list[str], sizes: Iterable[int]) -> dict[int, float]:
    """Slots -> the share of requests that hit, least recently used evicted; first uses count not.

    One pass for all sizes: a request hits wherever there are more slots than other adapters since
    its last use (Mattson et al. 1970, "Evaluation techniques for storage hierarchies").
    """
    stack: OrderedDict[str, None] = OrderedDict()
    depths: Counter[int] = Counter()
    for name in trace:
        if name in stack:
            depths[list(reversed(stack)).index(name) + 1] += 1
            stack.move_to_end(name)
        else:
            stack[name] = None
    repeated = sum(depths.values())
    if not repeated:
        return dict.fromkeys(sizes, 1.0)
    return {
        size: sum(count for depth, count in depths.items() if depth <= size) / repeated
        for size in sizes
    }


def _warning(num_requests: int, distinct: int, slots: int, rates: dict[int, float]) -> str:
    if num_requests < MIN_REQUESTS:
        return ""
    enough = next((s for s, rate in sorted(rates.items()) if rate >= GOOD_HIT_RATE), None)
    if rates[slots] < GOOD_HIT_RATE:
        better = f"; {enough} slots would reach {rates[enough]:.0%}" if enough else ""
        return (
            f"the last {num_requests} requests used {distinct} adapters and {slots} slots: "
            f"{rates[slots]:.0%} found theirs in place{better}"
        )
    if NEAR * slots < distinct <= slots:
        return (
            f"the last {num_requests} requests used {distinct} adapters, and there are {slots} "
            "slots: with more adapters than slots most requests may wait for a load"
        )
    return ""
