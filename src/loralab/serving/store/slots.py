"""The places in the model: which version has one, who uses it, what was found of it there."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loralab.serving.store.versions import Proof, Version


@dataclass(eq=False)
class Slot:
    """One place in the model, while it is taken.

    state: "loading" and "leaving" while the model is being changed.
    turn: counts up with every load; the lowest has been longest in its slot.
    num_served: leases given since it was loaded.
    """

    version: Version
    turn: int
    state: Literal["loading", "ready", "leaving"] = "loading"
    num_leases: int = 0
    num_served: int = 0
    last_use: int = 0

    @property
    def is_idle(self) -> bool:
        return self.state == "ready" and self.num_leases == 0


class SlotTable:
    """At most `size` of them. What is called here happens under the store's lock."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: dict[Version, Slot] = {}
        self._proofs: dict[Version, Proof] = {}
        self._clock = 0

    def __contains__(self, version: object) -> bool:
        return version in self._taken

    @property
    def taken(self) -> Mapping[Version, Slot]:
        """Version -> the slot that it has, or is getting, or is leaving."""
        return self._taken

    def take(self, version: Version) -> None:
        """Sets a slot aside for a version that will be put into it."""
        self._clock += 1
        self._taken[version] = Slot(version, turn=self._clock)

    def fill(self, version: Version, proof: Proof) -> None:
        """The version is in its slot now, and that was found of it."""
        self._taken[version].state = "ready"
        self._proofs[version] = proof

    def empty(self, version: Version) -> None:
        """The version is about to leave its slot."""
        self._taken[version].state = "leaving"

    def free(self, version: Version) -> None:
        """The version has no slot any more."""
        del self._taken[version]

    def lease(self, versions: Iterable[Version]) -> None:
        """Counts one more user of each."""
        self._clock += 1
        for version in versions:
            slot = self._taken[version]
            slot.num_leases += 1
            slot.num_served += 1
            slot.last_use = self._clock

    def give_back(self, versions: Iterable[Version]) -> None:
        """Counts one user less of each."""
        for version in versions:
            self._taken[version].num_leases -= 1

    def num_leases(self, name: str) -> int:
        """Users of any version of that adapter."""
        return sum(slot.num_leases for v, slot in self._taken.items() if v.name == name)

    def unwanted(self, wanted: Container[Version]) -> list[Version]:
        """Versions in slots that nobody uses and no new request gets."""
        return [v for v, slot in self._taken.items() if v not in wanted and slot.is_idle]

    def proof(self, version: Version) -> Proof | None:
        """What was found of it when it was last put into a slot."""
        return self._proofs.get(version)

    def forget_proofs(self, wanted: Container[Version]) -> None:
        """Of all versions but these."""
        self._proofs = {v: proof for v, proof in self._proofs.items() if v in wanted}

    def are_steady(self) -> bool:
        """Whether none is being filled or emptied."""
        return all(slot.state == "ready" for slot in self._taken.values())
