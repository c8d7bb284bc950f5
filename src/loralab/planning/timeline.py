"""The life of every storage of a step, and what that adds up to at each moment."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Where in the model something happens.

    block: the number of the repeated block, None outside. run: which run of alike blocks it is in.
    kind: the kind of layer, in words ("attention"); empty outside the model.
    """

    block: int | None = None
    run: int = 0
    kind: str = ""


@dataclass(slots=True)
class Block:
    """One storage: its bytes, and when it was allocated and freed on the tracer's clock.

    `died` is None for what outlives the trace. `kind` is set where it is known by itself
    (weights, gradients); the rest is told by when it is born and dies.
    """

    num_bytes: int
    born: int
    phase_born: str
    place: Place
    op: str = ""
    kind: str = ""
    died: int | None = None
    phase_died: str = ""


Moment = tuple[int, str, Place, str]
"""From this tick on: the phase, the place, the operation (outside of blocks)."""


@dataclass
class Timeline:
    """What a tracer recorded. `start` is the tick at which the step that counts begins."""

    blocks: list[Block]
    moments: list[Moment]
    start: int
    end: int
    flops: int
    num_ops: int
    _events: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)

    def events(self) -> list[tuple[int, int]]:
        """(index of a block, +1 born or -1 freed), in the order of time."""
        if not self._events:
            ticks = [(block.born, index, 1) for index, block in enumerate(self.blocks)]
            ticks += [
                (block.died, index, -1)
                for index, block in enumerate(self.blocks)
                if block.died is not None
            ]
            self._events = [(index, sign) for _, index, sign in sorted(ticks)]
        return self._events

    def moments_by_tick(self) -> Iterator[tuple[int, int, Moment]]:
        """(first tick, last tick + 1, moment) of each stretch of the step."""
        for index, moment in enumerate(self.moments):
            following = self.moments[index + 1][0] if index + 1 < len(self.moments) else self.end
            yield moment[0], following, moment


def kind_of(block: Block, classified: str = "") -> str:
    """In words, what a storage is held for."""
    if block.kind:
        return block.kind
    if block.phase_born == "setup":
        return "other"
    if block.phase_born in ("optimiser", "after backward"):
        return "optimiser temporaries"
    layer = block.place.kind
    if block.phase_born == "backward":
        return "temporaries"
    if block.phase_died == "forward":
        return "logits and loss" if layer in ("head", "") else "temporaries"
    if layer in ("head", ""):
        return "logits and loss"
    return f"activations: {layer}"


def by_kind(timeline: Timeline, tick: int, sizes: list[int]) -> dict[str, int]:
    """Bytes of what lives just after `tick`, by kind, largest first; `sizes` are the blocks'."""
    parts: defaultdict[str, int] = defaultdict(int)
    for block, size in zip(timeline.blocks, sizes, strict=True):
        if block.born <= tick and (block.died is None or block.died > tick):
            parts[kind_of(block)] += size
    return dict(sorted(parts.items(), key=lambda item: -item[1]))
