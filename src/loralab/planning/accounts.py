"""A timeline -> what it holds at its highest moments, in bytes, by kind."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from loralab.planning.allocator import CachingAllocator
from loralab.planning.devices import Device
from loralab.planning.facts import cublas_workspace_bytes
from loralab.planning.timeline import Timeline, kind_of

ROUNDING = "allocator rounding"
LIBRARIES = "cuBLAS workspaces"


@dataclass(frozen=True)
class Stretch:
    """A part of the step that has the same name whatever the number of blocks.

    block is "first", "middle" or "last" of its run of alike blocks, empty outside; there `after`
    is the block before, in the same words.
    """

    phase: str
    run: int = 0
    block: str = ""
    op: str = ""
    kind: str = ""
    after: str = ""


@dataclass(frozen=True)
class Peak:
    """The highest moment of a stretch. Bytes may be fractions of extended lines: round at the end.

    allocated: as `torch.cuda.max_memory_allocated` counts. reserved: what the allocator has taken
    from the driver by then. parts add up to `allocated`.
    """

    allocated: float | int
    reserved: float | int
    parts: Mapping[str, float | int]


@dataclass(frozen=True)
class Accounts:
    """The peaks of all stretches in the order of time, and what the step computes."""

    peaks: Mapping[Stretch, Peak]
    flops: float | int
    num_ops: float | int
    allocated_bytes: float | int  # all that the step allocates, one after the other

    @property
    def highest(self) -> tuple[Stretch, Peak]:
        """The stretch with the highest peak."""
        return max(self.peaks.items(), key=lambda item: item[1].allocated)

    @property
    def reserved(self) -> float | int:
        """The most the allocator has taken from the driver."""
        return max(max(peak.reserved, peak.allocated) for peak in self.peaks.values())


def account(timeline: Timeline, device: Device, runs: Mapping[int, tuple[int, int]]) -> Accounts:
    """Replay a timeline through the device's allocator.

    `runs` gives the first and last block of each run of alike blocks.
    """
    sizes = [block.num_bytes for block in timeline.blocks]
    always = {}
    if device.type == "cuda":
        always[LIBRARIES] = cublas_workspace_bytes(device.capability)
    allocated, reserved, rounded = _replay(timeline, sizes, device)
    stretches = _stretches(timeline, runs)
    tops: dict[Stretch, int] = {}
    highest_reserved: dict[Stretch, int] = {}
    for index, stretch in enumerate(stretches):
        if stretch is None or index >= len(allocated):
            continue
        if stretch not in tops or allocated[index] > allocated[tops[stretch]]:
            tops[stretch] = index
        highest_reserved[stretch] = max(highest_reserved.get(stretch, 0), reserved[index])
    snapshots = _snapshots(timeline, sizes, rounded, set(tops.values()))
    extra = sum(always.values())
    peaks = {
        stretch: Peak(
            allocated[index] + extra,
            highest_reserved[stretch] + extra,
            snapshots[index] | always,
        )
        for stretch, index in tops.items()
    }
    allocations = sum(b.num_bytes for b in timeline.blocks if b.born >= timeline.start)
    return Accounts(peaks, timeline.flops, timeline.num_ops, allocations)


def _replay(
    timeline: Timeline, sizes: list[int], device: Device
) -> tuple[list[int], list[int], list[int]]:
    """Bytes allocated and reserved after every event, and each block's size with rounding."""
    events = timeline.events()
    allocated, reserved = [], []
    if device.type != "cuda":
        total = 0
        for index, sign in events:
            total += sign * sizes[index]
            allocated.append(total)
        return allocated, allocated, sizes
    allocator = CachingAllocator()
    pieces = {}
    rounded = list(sizes)
    for index, sign in events:
        if sign > 0:
            pieces[index] = piece = allocator.allocate(sizes[index])
            rounded[index] = piece.size if piece else 0
        else:
            allocator.free(pieces.pop(index))
        allocated.append(allocator.allocated)
        reserved.append(allocator.reserved)
    return allocated, reserved, rounded


def _stretches(timeline: Timeline, runs: Mapping[int, tuple[int, int]]) -> list[Stretch | None]:
    """The stretch that each event falls into; None before the step that counts."""
    found: list[Stretch | None] = [None] * timeline.start
    last = Stretch("")
    for _, end, (_, phase, place, op) in timeline.moments_by_tick():
        if place.block is not None and place.run in runs:
            stretch = last = Stretch(phase, place.run, _side(place.block, *runs[place.run]))
        else:
            after = last.block if last.phase == phase else ""
            stretch = Stretch(phase, op=op, kind=place.kind, after=after)
        found += [stretch] * (end - len(found))
    return found


def _side(block: int, first: int, last: int) -> str:
    return "first" if block == first else "last" if block == last else "middle"


def _snapshots(
    timeline: Timeline, sizes: list[int], rounded: list[int], wanted: set[int]
) -> dict[int, dict[str, float | int]]:
    """Parts by kind after each of the events in `wanted`."""
    parts: defaultdict[str, float | int] = defaultdict(float)
    kinds = [kind_of(block) for block in timeline.blocks]
    found = {}
    for event, (index, sign) in enumerate(timeline.events()):
        parts[kinds[index]] += sign * sizes[index]
        parts[ROUNDING] += sign * (rounded[index] - sizes[index])
        if event in wanted:
            found[event] = {kind: held for kind, held in parts.items() if held}
    return found
