"""Who is served next: tenants take turns by what they were given, not by what they ask for.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): the
next request is one of the tenant that was given the least, an answer's token counting twice a
prompt's. It is deficit round robin for work whose size is known only when it is done. Who was idle
gains no credit by it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Generic, TypeVar

from loralab.errors import CapacityError

Item = TypeVar("Item")

ANSWER_WEIGHT = 2
"""What a token of an answer costs, in tokens of a prompt (as in the paper)."""

GREED = 2
"""A tenant may have so many times the free places (the dynamic threshold of Choudhury and Hahne
1998): one alone fills two thirds of them, the next two thirds of the rest, so that a newcomer finds
some. The HTTP server's places are shared by the same rule."""

REMEMBERED = 1000
"""Tenants whose accounts are kept while they are away."""

LOOK_AHEAD = 16
"""Requests of one tenant that are looked at behind one that has to wait."""


class FairQueue(Generic[Item]):
    """Waiting requests by tenant. Not safe for threads; the engine holds its lock.

    max_waiting: places in all.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._waiting: dict[str, deque[Item]] = {}
        self._given: dict[str, float] = {}
        self._floor = 0.0  # what the tenant served last had been given

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        return (item for queue in self._waiting.values() for item in queue)

    def waiting(self) -> dict[str, int]:
        """How many requests wait, by tenant."""
        return {tenant: len(queue) for tenant, queue in self._waiting.items()}

    def put(self, tenant: str, item: Item) -> None:
        """Raises `CapacityError` where the tenant has its share of the queue waiting already."""
        own, total = len(self._waiting.get(tenant, ())), len(self)
        if own >= GREED * (self.max_waiting - total):
            whose = f" ({own} of them of {tenant!r})" if tenant else ""
            raise CapacityError(
                f"{total} requests are waiting{whose}; the queue has {self.max_waiting} places",
                "try again in a few seconds, or send fewer requests at a time.",
            )
        if not own:
            rivals = [self._given[name] for name in self._waiting]
            least = min(rivals, default=self._floor)
            self._given[tenant] = max(self._given.get(tenant, 0.0), least)
        self._waiting.setdefault(tenant, deque()).append(item)

    def pop(self, fits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """The next request that fits, of the tenant that was given the least; None: none fits."""
        for tenant in sorted(self._waiting, key=lambda name: self._given[name]):
            queue = self._waiting[tenant]
            for item in list(queue)[:LOOK_AHEAD]:
                if fits(item):
                    self._floor = max(self._floor, self._given[tenant])
                    self.remove(tenant, item)
                    return item
        return None

    def remove(self, tenant: str, item: Item) -> None:
        """Takes one request out, if it is there."""
        queue = self._waiting.get(tenant)
        if queue is None or item not in queue:
            return
        queue.remove(item)
        if not queue:
            del self._waiting[tenant]

    def charge(self, tenant: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Notes what a tenant was given."""
        own = self._given.get(tenant, self._floor)
        self._given[tenant] = own + prompt_tokens + ANSWER_WEIGHT * answer_tokens
        if len(self._given) > REMEMBERED:  # who comes back starts from the floor
            self._floor = max(self._floor, median(self._given.values()))
            self._given = {
                name: given
                for name, given in self._given.items()
                if name in self._waiting or given > self._floor
            }
