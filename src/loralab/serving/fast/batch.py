"""The chunks of one call as flat tokens, and the tokens of each adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loralab.serving.requests import Entry
from loralab.serving.runner import Chunk


@dataclass
class Group:
    """The tokens that one adapter is added to, and its weight at each of them."""

    adapter: str
    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Span:
    """A chunk's place among the flat tokens."""

    slot: int
    start: int  # tokens that the slot holds before
    first: int
    num_tokens: int


@dataclass(frozen=True)
class Batch:
    """Tokens of all chunks, one after another. wanted: the tokens whose logits are read."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    spans: list[Span]
    groups: list[Group]
    wanted: list[int]


def mix_of(entry: Entry) -> dict[str, float]:
    """The weights of an entry's adapters, those of weight 0 left out."""
    if entry is None:
        return {}
    weights = {entry: 1.0} if isinstance(entry, str) else entry
    return {name: float(weight) for name, weight in weights.items() if weight}


def flatten(
    chunks: Sequence[Chunk], order: Callable[[str], int], *, every_token: bool = False
) -> Batch:
    """The chunks as a `Batch`.

    order: of the adapters, so that a token's sum of several does not depend on other chunks.
    every_token: logits are wanted after every token, not after the last of each chunk alone.
    """
    batch = Batch([], [], [], [], [], [])
    groups: dict[str, Group] = {}
    for chunk in chunks:
        first, count = len(batch.ids), len(chunk.token_ids)
        batch.ids.extend(chunk.token_ids)
        batch.positions.extend(range(chunk.start, chunk.start + count))
        batch.slots.extend([chunk.slot] * count)
        batch.spans.append(Span(chunk.slot, chunk.start, first, count))
        batch.wanted.extend(range(first if every_token else first + count - 1, first + count))
        for name, weight in mix_of(chunk.entry).items():
            group = groups.setdefault(name, Group(name))
            group.tokens.extend(range(first, first + count))
            group.weights.extend([weight] * count)
    batch.groups.extend(sorted(groups.values(), key=lambda group: order(group.adapter)))
    return batch
