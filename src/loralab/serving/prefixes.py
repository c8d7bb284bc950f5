"""Which tokens each slot's keys and values stand for, and who may go on from them.

Keys and values depend on the tokens and on the adapter's content. So a prefix is reused where both
are equal, and adapters that bear one name one after the other never meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

WORTH_COPYING = 16
"""Tokens: a shorter prefix is computed again sooner than it is copied."""


@dataclass
class Slot:
    """What one slot holds.

    tokens: those whose keys and values it holds, in order.
    identity: of the adapter they were computed with; None: with more than one, never reused.
    taken: whether a running request goes on in it.
    last_use: number of the admission or release that touched it last.
    promised: the tokens that it will hold once the running prompt is read.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    identity: str | None = ""
    taken: bool = False
    last_use: int = 0
    promised: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """Where a request begins: its slot, how many of its tokens it holds, whence they are copied."""

    slot: Slot
    num_reused: int
    copied_from: Slot | None = None


class Slots:
    """The slots of one runner. Not safe for threads; the engine's own thread uses it."""

    def __init__(self, num_slots: int) -> None:
        self.slots = [Slot(number) for number in range(num_slots)]
        self._clock = 0

    @property
    def num_free(self) -> int:
        return sum(not slot.taken for slot in self.slots)

    def should_wait(self, tokens: Sequence[int], identity: str) -> bool:
        """Whether another request is reading a prompt whose beginning is worth waiting for."""
        tokens = list(tokens)
        now = max(_num_held(slot, tokens, identity) for slot in self.slots)
        soon = max(
            _num_common(slot.promised, tokens) if slot.identity == identity else 0
            for slot in self.slots
        )
        return min(soon, len(tokens) - 1) >= now + WORTH_COPYING

    def take(self, tokens: Sequence[int], identity: str) -> Start | None:
        """The slot in which a request for these tokens begins; None where no slot is free.

        At least the last token is left to be computed: its logits are wanted. A slot that holds
        more than the prefix keeps it, where another is free: the prefix is copied to that one.
        """
        tokens = list(tokens)
        free = [slot for slot in self.slots if not slot.taken]
        if not free:
            return None
        source = max(self.slots, key=lambda s: (_num_held(s, tokens, identity), not s.taken))
        oldest = min(free, key=lambda slot: (bool(slot.tokens), slot.last_use))
        reused = min(_num_held(source, tokens, identity), len(tokens) - 1)
        if not source.taken and (source is oldest or reused == len(source.tokens)):
            return self._begin(Start(source, reused), tokens, identity)
        if reused >= WORTH_COPYING:
            return self._begin(Start(oldest, reused, source), tokens, identity)
        return self._begin(Start(oldest, 0), tokens, identity)

    def _begin(self, start: Start, tokens: list[int], identity: str) -> Start:
        slot = start.slot
        slot.tokens, slot.identity = tokens[: start.num_reused], identity
        self._clock += 1
        slot.taken, slot.promised, slot.last_use = True, tokens, self._clock
        return start

    def release(self, slot: Slot, *, sound: bool = True) -> None:
        """Frees the slot; what it holds may be reused if it is `sound`."""
        self._clock += 1
        slot.taken, slot.promised, slot.last_use = False, [], self._clock
        if not sound or slot.identity is None:
            slot.tokens, slot.identity = [], ""


def _num_held(slot: Slot, tokens: list[int], identity: str) -> int:
    """How many first tokens the slot holds for that identity."""
    return _num_common(slot.tokens, tokens) if slot.identity == identity else 0


def _num_common(a: list[int], b: list[int]) -> int:
    """How many first tokens are equal; by halving, as comparing slices is quick."""
    low, high = 0, min(len(a), len(b))
    if high == 0 or a[0] != b[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
