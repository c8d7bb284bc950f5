"""A timeline -> what it holds at its highest moments, in bytes, by kind."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loralab.planning.allocator import CachingAllocator, rounded_size
from loralab.planning.blocks import Run
from loralab.planning.devices import Device
from loralab.planning.facts import cublas_workspace_bytes
from loralab.planning.timeline import Timeline, kind_of

ROUNDING = "allocator rounding"
LIBRARIES = "cuBLAS workspaces"


@dataclass(frozen=True)
class Stretch:
    """A part of the step that has the same name whatever the number of blocks.

    block: the block's place in its run of alike blocks, 0, 1, ... from the first or -1, -2, ...
    from the last; None outside, where `after` is the block before.
    """

    phase: str
    run: int = 0
    block: int | None = None
    op: str = ""
    kind: str = ""
    after: int | None = None


@dataclass(frozen=True)
class Peak:
    """The highest moment of a stretch, in bytes (fractions come from lines: round at the end).

    rounded: of all requests, each rounded as the allocator does. unsplit: what the allocator left
    on its pieces because too little remained to be of use. parts add up to `allocated`.
    """

    rounded: float | int
    unsplit: float | int
    parts: Mapping[str, float | int]

    @property
    def allocated(self) -> float | int:
        """What `torch.cuda.max_memory_allocated` counts."""
        return self.rounded + self.unsplit


@dataclass(frozen=True)
class Accounts:
    """The peaks of all stretches in the order of time, and what the step computes."""

    peaks: Mapping[Stretch, Peak]
    flops: float | int
    num_ops: float | int
    allocated_bytes: float | int  # all that the step allocates, one after the other
    reserved: float | int | None = None  # most taken from the driver; None where not followed

    @property
    def highest(self) -> tuple[Stretch, Peak]:
        """The stretch with the highest peak."""
        return max(self.peaks.items(), key=lambda item: item[1].allocated)


def account(timeline: Timeline, device: Device, runs: Sequence[Run]) -> Accounts:
    """Replay a timeline through the device's allocator.

    `runs` are the runs of alike blocks, with the blocks that were traced.
    """
    sizes = [block.num_bytes for block in timeline.blocks]
    always = {}
    if device.type == "cuda":
        always[LIBRARIES] = cublas_workspace_bytes(device.capability)
    replay = _replay(timeline, sizes, device)
    tops: dict[Stretch, int] = {}
    for start, end, stretches in _stretches(timeline, runs):
        top = max(range(start, end), key=replay.allocated.__getitem__)
        for stretch in stretches:
            if stretch not in tops or replay.allocated[top] > replay.allocated[tops[stretch]]:
                tops[stretch] = top
    snapshots = _snapshots(timeline, sizes, replay, set(tops.values()))
    extra = sum(always.values())
    peaks = {
        stretch: Peak(
            replay.rounded[top] + extra,
            replay.allocated[top] - replay.rounded[top],
            snapshots[top] | always,
        )
        for stretch, top in tops.items()
    }
    allocations = sum(b.num_bytes for b in timeline.blocks if b.born >= timeline.start)
    return Accounts(
        peaks, timeline.flops, timeline.num_ops, allocations, replay.most_reserved + extra
    )


@dataclass(frozen=True)
class _Replay:
    """Bytes after every event (as asked for and rounded; as held), and the pieces' sizes."""

    rounded: list[int]
    allocated: list[int]
    pieces: list[int]
    most_reserved: int


def _replay(timeline: Timeline, sizes: list[int], device: Device) -> _Replay:
    is_cached = device.type == "cuda"
    allocator = CachingAllocator()
    held = {}
    rounded, allocated, pieces = [], [], list(sizes)
    total = 0
    for index, sign in timeline.events():
        size = rounded_size(sizes[index]) if is_cached else sizes[index]
        total += sign * size
        if is_cached and sign > 0:
            held[index] = piece = allocator.allocate(size)
            pieces[index] = piece.size if piece else 0
        elif is_cached:
            allocator.free(held.pop(index))
        rounded.append(total)
        allocated.append(allocator.allocated if is_cached else total)
    return _Replay(rounded, allocated, pieces, allocator.reserved)


def _stretches(timeline: Timeline, runs: Sequence[Run]) -> Iterator[tuple[int, int, list[Stretch]]]:
    """(first event, last event + 1, its names) of each stretch of the step that counts."""
    ends = list(accumulate(run.kept for run in runs))
    starts = {run.number: end - run.kept for run, end in zip(runs, ends, strict=True)}
    by_number = {run.number: run for run in runs}
    before: list[Stretch] = []
    for start, end, (_, phase, place, op) in timeline.moments_by_tick():
        if end == start:
            continue
        if place.block is not None and place.run in by_number:
            run = by_number[place.run]
            names = [
                Stretch(phase, run.number, position)
                for position in _positions(place.block - starts[run.number], run)
            ]
            before = names
        else:  # under each name of the block before: models of few blocks have others in common
            after = [each.block for each in before if each.phase == phase] or [None]
            names = [Stretch(phase, op=op, kind=place.kind, after=block) for block in after]
        yield start, end, names


def _positions(index: int, run: Run) -> list[int]:
    """Where a kept block stands, from the first and from the last: the names that every number
    of blocks has. Two periods at each end are told apart; what lies between is on a line."""
    near = 2 * run.period
    found = [index] if index < near else []
    if index >= run.kept - near:
        found.append(index - run.kept)
    return found or [near - 1]


def _snapshots(
    timeline: Timeline, sizes: list[int], replay: _Replay, wanted: set[int]
) -> dict[int, dict[str, float | int]]:
    """Parts by kind after each of the events in `wanted`."""
    parts: defaultdict[str, float | int] = defaultdict(int)
    kinds = [kind_of(block) for block in timeline.blocks]
    found = {}
    for event, (index, sign) in enumerate(timeline.events()):
        parts[kinds[index]] += sign * sizes[index]
        parts[ROUNDING] += sign * (replay.pieces[index] - sizes[index])
        if event in wanted:
            found[event] = {kind: held for kind, held in parts.items() if held}
    return found
