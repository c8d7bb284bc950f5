"""Which waiting request gets its adapters now, and which slots change hands for the others.

A pure function of the state, so that its laws can be tested: nobody waits for ever, and a flood on
one adapter does not keep the others out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loralab.serving.store.slots import Slot
from loralab.serving.store.versions import Version

Needs = tuple[Version, ...]


@dataclass
class Plan:
    """grants: numbers of the requests that are served; load, empty: slots that change hands.

    prefetch: what will be loaded as soon as a slot is free, in that order.
    closed: slots that get no new leases, since somebody waits for them.
    """

    grants: list[int] = field(default_factory=list)
    load: list[Version] = field(default_factory=list)
    empty: list[Version] = field(default_factory=list)
    prefetch: list[Version] = field(default_factory=list)
    closed: set[Version] = field(default_factory=set)


def plan(
    needs: Sequence[Needs],
    slots: Mapping[Version, Slot],
    *,
    num_slots: int,
    max_leases: int,
    pinned: frozenset[Version] = frozenset(),
) -> Plan:
    """What to do now for requests with these needs, in the order they came.

    First, whatever is missing gets a free slot, else an idle one (least recently used), else the
    slot with the oldest turn is closed, so that it empties. A slot keeps its turn until it has
    served those who wait for it once. Then every request whose adapters are all in open slots is
    served, as long as no adapter has more than `max_leases`.
    """
    made = Plan()
    in_place = [all(_is_ready(slots, v) for v in versions) for versions in needs]
    called_for = {v for ready, vs in zip(in_place, needs, strict=True) if ready for v in vs}
    claimed = set(pinned)
    free = num_slots - len(slots)
    leaving = sum(slot.state == "leaving" for slot in slots.values())
    asked: set[Version] = set()
    for versions, ready in zip(needs, in_place, strict=True):
        if ready:
            continue
        claimed.update(versions)
        for version in versions:
            if version in asked or (version in slots and slots[version].state != "leaving"):
                continue
            asked.add(version)
            if free > 0 and version not in slots:
                made.load.append(version)
                free -= 1
                continue
            made.prefetch.append(version)
            if leaving > 0:
                leaving -= 1
            else:
                _give_up_a_slot(made, slots, claimed, called_for)
    _grant(made, needs, in_place, slots, max_leases)
    return made


def _give_up_a_slot(
    made: Plan, slots: Mapping[Version, Slot], claimed: set[Version], called_for: set[Version]
) -> None:
    others = [
        slot
        for version, slot in slots.items()
        if slot.state == "ready"
        and version not in claimed
        and version not in made.closed
        and not (slot.num_served == 0 and version in called_for)
    ]
    idle = [s for s in others if s.num_leases == 0 and s.version not in called_for]
    if idle:
        chosen = min(idle, key=lambda slot: slot.last_use)
    elif others:
        chosen = min(others, key=lambda slot: slot.turn)
    else:
        return
    made.closed.add(chosen.version)
    if chosen.num_leases == 0:
        made.empty.append(chosen.version)


def _grant(
    made: Plan,
    needs: Sequence[Needs],
    in_place: Sequence[bool],
    slots: Mapping[Version, Slot],
    max_leases: int,
) -> None:
    leases = {version: slot.num_leases for version, slot in slots.items()}
    for number, (versions, ready) in enumerate(zip(needs, in_place, strict=True)):
        if not ready or made.closed.intersection(versions):
            continue
        if all(leases[version] < max_leases for version in versions):
            made.grants.append(number)
            for version in versions:
                leases[version] += 1


def _is_ready(slots: Mapping[Version, Slot], version: Version) -> bool:
    return version in slots and slots[version].state == "ready"
