"""Names that may be asked for, the folders behind them, and what the folders are known to hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from loralab.errors import (
    AdapterError,
    CapacityError,
    ConflictError,
    ForbiddenError,
    LoralabError,
    RequestError,
    UnknownAdapterError,
    nearest,
)
from loralab.serving.store.registry import WHAT_A_NAME_IS, Registry, Stamp, is_name
from loralab.serving.store.versions import Version


@dataclass
class Entry:
    """What the store knows of one name.

    version: in service, or the first that was read.
    candidate: a newer version that is not in service yet.
    seen: the stamp of the files that the newest of them, or `refused`, was made of.
    reading: the folder is being read; stale: since it holds something new, so that requests wait.
    asked: it was loaded by that name on purpose, not only found in the registry.
    """

    name: str
    folder: str
    version: Version | None = None
    candidate: Version | None = None
    seen: Stamp | None = None
    refused: Exception | None = None
    reading: bool = False
    stale: bool = False
    pinned: bool = False
    asked: bool = False

    @property
    def wanted(self) -> Version | None:
        """The version that new requests get."""
        return self.candidate or self.version

    def was_read(self, version: Version, stamp: Stamp) -> None:
        """The folder holds this version."""
        self.seen, self.refused = stamp, None
        if self.version is None or version == self.version:
            self.version = version  # with what it says of itself now
        self.candidate = None if version == self.version else version

    def is_in_service(self, version: Version) -> None:
        """The version was put into the model and proved."""
        self.version, self.candidate, self.refused = version, None, None

    def refuse(self, fault: Exception, *, version_is_at_hand: bool) -> None:
        """The folder's content, or what was made of it, is not served; the one before serves on."""
        self.refused, self.candidate = fault, None
        if not version_is_at_hand:
            self.version = None
        if isinstance(fault, CapacityError) or not isinstance(fault, LoralabError):
            self.seen = None  # it may pass: the next request looks again


class Names:
    """Entries by name; the store's lock guards them."""

    def __init__(self, registry: Registry, reserved: Sequence[str]) -> None:
        self.registry = registry
        self._reserved = frozenset(reserved)
        self._entries: dict[str, Entry] = {}
        self._withdrawn: set[str] = set()

    def all(self) -> list[str]:
        """All names that may be asked for, sorted."""
        known = set(self._entries) | set(self.registry.names())
        return sorted(known - self._withdrawn - self._reserved)

    def entries(self) -> list[Entry]:
        """The entries of names that were asked for so far."""
        return list(self._entries.values())

    def find(self, name: str) -> Entry | None:
        """The entry, where the name was asked for before and is not unloaded or gone."""
        return self._entries.get(name)

    def open(self, name: str) -> Entry:
        """The entry of a name, new if its folder was not asked for yet.

        Raises `UnknownAdapterError` with the nearest name.
        """
        if name in self._entries:
            return self._entries[name]
        known = is_name(name) and name not in self._withdrawn and name not in self._reserved
        try:
            if known:
                self.registry.folder(name)
        except (UnknownAdapterError, ForbiddenError):
            known = False
        if not known:
            raise self.unknown(name)
        self._entries[name] = Entry(name, name)
        return self._entries[name]

    def unknown(self, name: str) -> UnknownAdapterError:
        """The error that names the nearest adapter."""
        known = self.all()
        hint = nearest(name, known) if known else "this server has no adapters."
        return UnknownAdapterError(f"there is no adapter {name[:120]!r}", hint)

    def stamp(self, entry: Entry) -> Stamp:
        """What the folder holds now. One that is gone is forgotten: `UnknownAdapterError`."""
        try:
            return self.registry.stamp(entry.folder)
        except (UnknownAdapterError, ForbiddenError):
            del self._entries[entry.name]
            raise self.unknown(entry.name) from None

    def enter(self, name: str, folder: str, *, replace: bool) -> None:
        """Serves a folder of the registry under a name.

        Raises `RequestError` for a name that is none, `ConflictError` for one that is taken
        (unless `replace`), and as `Registry.stamp` for the folder.
        """
        if not is_name(name):
            raise RequestError(f"{name[:120]!r} is no adapter's name", f"give {WHAT_A_NAME_IS}.")
        if name in self._reserved:
            raise ConflictError(f"{name!r} is the base's name", "choose another lora_name.")
        self.registry.stamp(folder)
        present = self._entries.get(name)
        if present is not None and present.asked and not replace:
            raise ConflictError(
                f"adapter {name!r} is loaded already",
                'unload it first, or pass "load_inplace": true.',
            )
        if name != folder and name in self.registry.names() and not replace:
            raise ConflictError(
                f"there is a folder {name!r} beside {folder!r}",
                'choose another lora_name, or pass "load_inplace": true.',
            )
        self._withdrawn.discard(name)
        if present is None or present.folder != folder:
            pinned = present is not None and present.pinned
            present = self._entries[name] = Entry(name, folder, pinned=pinned)
        elif present.refused is not None and not present.reading:
            present.seen = None  # asked for once more: look again
        present.asked = True

    def withdraw(self, name: str) -> None:
        """Serves a name no more, until it is entered again."""
        self.open(name)
        self._withdrawn.add(name)
        del self._entries[name]

    def pin(self, name: str, num_slots: int) -> None:
        """Keeps the adapter in its slot. Raises `ConflictError` where that leaves none free."""
        entry = self.open(name)
        if self._num_pinned(but=(name,)) + 1 >= num_slots:
            raise ConflictError(
                f"{num_slots} slots: one must stay free of pinned adapters",
                "pin fewer, or start the server with more --slots.",
            )
        entry.pinned = True

    def check_room(self, names: Sequence[str], num_slots: int) -> None:
        """Raises `RequestError` where these never fit the slots at one time."""
        left = num_slots - self._num_pinned(but=names)
        if len(names) > left:
            raise RequestError(
                f"the mix uses {len(names)} adapters, this server has {left} slots for them",
                "mix fewer, or start the server with more --slots.",
            )

    def needs(self, names: Sequence[str]) -> tuple[Version, ...] | Exception | None:
        """The versions these names stand for; why they stand for none; None while one is read."""
        versions: list[Version] = []
        for name in names:
            entry = self._entries.get(name)
            if entry is None:
                return self.unknown(name)
            if entry.wanted is None and not entry.reading:
                return entry.refused or AdapterError(f"adapter {name!r} was not read", "ask again.")
            if entry.wanted is not None and not entry.stale:
                versions.append(entry.wanted)
        return tuple(versions) if len(versions) == len(names) else None

    def wanted_versions(self) -> set[Version]:
        """Every version that is in service or about to be."""
        return {v for e in self._entries.values() for v in (e.version, e.candidate) if v}

    def pinned_versions(self) -> frozenset[Version]:
        """What must stay in its slot."""
        return frozenset(e.wanted for e in self._entries.values() if e.pinned and e.wanted)

    def _num_pinned(self, but: Sequence[str]) -> int:
        return sum(e.pinned for e in self._entries.values() if e.name not in but)
