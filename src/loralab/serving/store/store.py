"""The store: adapters between disk, memory and the model's slots, leased to requests.

All state is behind one lock. `_schedule` looks at the waiting requests in the order they came and
starts whatever brings the first of them on; it is called after every change. Reading and attaching
run in two threads of the store's own, so that the next adapter is read while one is attached.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from loralab.adapters import Adapter
from loralab.errors import AdapterError, CapacityError, LoralabError
from loralab.serving.faults import out_of_memory
from loralab.serving.store.leases import Lease, Waiter, fail, hand_over
from loralab.serving.store.memory import Memory
from loralab.serving.store.names import Entry, Names
from loralab.serving.store.place import Place
from loralab.serving.store.reading import Limits, Reader
from loralab.serving.store.registry import Registry, Stamp
from loralab.serving.store.scheduling import plan
from loralab.serving.store.slots import SlotTable
from loralab.serving.store.versions import AdapterState, StoreEvent, Tier, Version
from loralab.serving.store.working_set import WorkingSet

logger = logging.getLogger("loralab")
GIB = 2**30


class AdapterStore:
    """Adapters of a registry, at most `num_slots` of them in the model at a time.

    max_leases: of one adapter at a time, so that a flood on it can be made to leave its slot.
    on_event: told of loads, evictions and refusals, from any thread.
    reserved: names that adapters must not have (the base's).
    """

    def __init__(
        self,
        registry: Registry,
        place: Place,
        *,
        num_slots: int = 8,
        max_leases: int = 64,
        memory_bytes: int = 2 * GIB,
        limits: Limits | None = None,
        reserved: Sequence[str] = (),
        on_event: Callable[[StoreEvent], None] = lambda event: None,
    ) -> None:
        self.registry, self.place = registry, place
        self.max_leases = max_leases
        self._reader = Reader(registry, limits or Limits(), place.misfits)
        self.working_set = WorkingSet()
        self._on_event = on_event
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._names = Names(registry, reserved)
        self._memory = Memory(memory_bytes)
        self._slots = SlotTable(num_slots)
        self._waiting: deque[Waiter] = deque()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="adapters")
        self._closed = False

    @property
    def num_slots(self) -> int:
        return self._slots.size

    # requests ---------------------------------------------------------------------------------

    def lease(self, names: Sequence[str]) -> "Future[Lease]":
        """The present versions of these adapters, once all of them are in the model.

        The future fails as `Reader.read` does, and with what the proof found. Cancelling it gives
        the place in the queue away. Raises `UnknownAdapterError` (with the nearest name),
        `RequestError` for more adapters than there are slots, `CapacityError` once closed.
        """
        names = tuple(dict.fromkeys(names))
        waiter = Waiter(names)
        with self._lock:
            if self._closed:
                raise _closing()
            for name in names:
                self._look(self._names.open(name))
            self._names.check_room(names, self.num_slots)
            self.working_set.note(names)
            self._waiting.append(waiter)
            done = self._schedule()
        hand_over(done)
        return waiter.future

    def check_known(self, names: Sequence[str]) -> None:
        """Raises `UnknownAdapterError`, with the nearest name, where one of them is none."""
        with self._lock:
            for name in names:
                self._names.open(name)

    def names(self) -> list[str]:
        """All names that may be asked for, sorted."""
        with self._lock:
            return self._names.all()

    def describe(self) -> list[AdapterState]:
        """What is known of every name, sorted."""
        with self._lock:
            names = self._names.all()
            return [self._state(self._names.find(name) or Entry(name, name)) for name in names]

    def num_waiting(self) -> int:
        """Requests that wait for their adapters."""
        with self._lock:
            return len(self._waiting)

    # administration ---------------------------------------------------------------------------

    def load(self, name: str, folder: str, *, replace: bool = False) -> "Future[Lease]":
        """Serves the registry's `folder` under `name`, and puts it into the model.

        Raises `ConflictError` for a name that is taken (unless `replace`), `RequestError` for what
        is no name, `ForbiddenError` for a folder outside the registry.
        """
        with self._lock:
            self._names.enter(name, folder, replace=replace)
        return self.lease([name])

    def unload(self, name: str) -> int:
        """Serves the adapter no more; gives the number of requests that finish on it.

        Its memory is free once they have. Raises `UnknownAdapterError`.
        """
        with self._lock:
            self._names.withdraw(name)
            num_leases = self._slots.num_leases(name)
            done = self._schedule()
        hand_over(done)
        return num_leases

    def pin(self, name: str) -> "Future[Lease]":
        """Loads the adapter and keeps it in its slot whatever else is asked for.

        Raises `ConflictError` where no slot would be left for the others.
        """
        with self._lock:
            self._names.pin(name, self.num_slots)
        return self.lease([name])

    def unpin(self, name: str) -> None:
        """Lets the adapter make room again."""
        with self._lock:
            self._names.open(name).pinned = False

    def survey(self) -> None:
        """Reads every adapter once, so that its version or fault is known; takes a while."""
        for name in self.names():
            with self._lock:
                if self._closed:
                    return
                try:
                    entry = self._names.open(name)
                    stamp = self._names.stamp(entry)
                except AdapterError:
                    continue  # it went away meanwhile
                if entry.reading or entry.seen == stamp:
                    continue
                entry.reading = True
            self._read(entry, stamp, keep=False)

    def wait_until_idle(self, timeout_seconds: float | int) -> bool:
        """Whether, within that time, nothing waits, is read, is loading or leaving."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_seconds)

    def close(self) -> None:
        """Fails whatever waits, and ends the store's threads."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for waiter in waiting:
            fail(waiter, _closing())
        self._threads.shutdown(wait=True)

    # scheduling -------------------------------------------------------------------------------

    def _schedule(self) -> list[tuple[Waiter, "Lease | Exception"]]:
        """Brings waiting requests on; gives those that are done waiting, to be told so later."""
        if self._closed:
            return []
        self._let_go_of_old_versions()
        done: list[tuple[Waiter, Lease | Exception]] = []
        unread: list[Waiter] = []
        read: list[tuple[Waiter, tuple[Version, ...]]] = []
        for waiter in self._waiting:
            needs = self._names.needs(waiter.names)
            if isinstance(needs, Exception):
                done.append((waiter, needs))
            elif needs is None:
                unread.append(waiter)
            elif not waiter.future.cancelled():
                read.append((waiter, needs))
        made = plan(
            [needs for _, needs in read],
            self._slots.taken,
            num_slots=self.num_slots,
            max_leases=self.max_leases,
            pinned=self._names.pinned_versions(),
        )
        for version in made.load:
            self._slots.take(version)
            self._threads.submit(self._load, version)
        for version in made.empty:
            self._empty(version)
        for version in made.prefetch[: self.num_slots]:
            self._prefetch(version)
        done += [(read[number][0], self._lease(read[number][1])) for number in made.grants]
        left = {id(w) for w in (*unread, *(w for w, _ in read))} - {id(w) for w, _ in done}
        self._waiting = deque(waiter for waiter in self._waiting if id(waiter) in left)
        self._changed.notify_all()
        return done

    def _lease(self, versions: tuple[Version, ...]) -> Lease:
        self._slots.lease(versions)
        return Lease(versions, self._return)

    def _return(self, lease: Lease) -> None:
        with self._lock:
            self._slots.give_back(lease.versions)
            done = self._schedule()
        hand_over(done)

    def _let_go_of_old_versions(self) -> None:
        """Empties slots of versions that no new request gets, and forgets all about them."""
        wanted = self._names.wanted_versions()
        for version in self._slots.unwanted(wanted):
            self._empty(version)
        self._memory.keep_only(wanted)
        self._slots.forget_proofs(wanted)

    def _look(self, entry: Entry) -> None:
        """Notices what happened to the folder: gone, or with other files than before.

        Files that were read while they were new are read once more, while their version serves.
        """
        stamp, seen = self._names.stamp(entry), entry.seen
        if stamp != seen and not entry.stale:
            entry.reading = entry.stale = True
            self._threads.submit(self._read, entry, stamp)
        elif seen is not None and stamp.settled > seen.settled and not entry.reading:
            entry.reading = True
            self._threads.submit(self._read, entry, stamp, keep=False)

    def _prefetch(self, version: Version) -> None:
        """Has a version read that will be wanted, while it waits for a slot."""
        entry = self._names.find(version.name)
        if version in self._memory or entry is None or entry.reading or entry.refused is not None:
            return
        entry.reading = True
        self._threads.submit(self._read, entry, entry.seen)

    def _empty(self, version: Version) -> None:
        self._slots.empty(version)
        self._threads.submit(self._detach, version)

    # in the store's threads -------------------------------------------------------------------

    def _read(self, entry: Entry, stamp: Stamp | None, keep: bool = True) -> None:
        """Reads what the folder holds now; it becomes the version that is wanted, or is refused."""
        fault: Exception | None = None
        stored = None
        try:
            stored = self._reader.read(entry.folder)
        except Exception as error:
            fault = out_of_memory(error) or error
        with self._lock:
            entry.reading = entry.stale = False
            if stored is not None:
                version = Version(
                    entry.name,
                    stored.content,
                    stored.num_bytes,
                    stored.rank,
                    stored.adapter.label_names,
                )
                entry.was_read(version, stored.stamp)
                if keep:
                    self._memory.put(version, stored.adapter, self._only_copy)
            elif fault is not None:
                entry.seen = stamp
                self._refuse(entry, fault)
            done = self._schedule()
        hand_over(done)

    def _load(self, version: Version) -> None:
        """Puts a version into the slot that was set aside for it."""
        started = time.perf_counter()
        fault: Exception | None = None
        proof = None
        try:
            proof = self.place.attach(version, self._value(version))
        except Exception as error:
            fault = out_of_memory(error) or error
        with self._lock:
            entry = self._names.find(version.name)
            if entry is not None and version != entry.wanted:
                entry = None  # something newer has come meanwhile
            if proof is not None:
                self._slots.fill(version, proof)
                if entry is not None:
                    entry.is_in_service(version)
            else:
                self._slots.free(version)
                self._memory.drop(version)
                if entry is not None and fault is not None:
                    self._refuse(entry, fault)
            done = self._schedule()
        if proof is not None:
            seconds = time.perf_counter() - started
            self._on_event(StoreEvent("loaded", version.name, seconds))
            logger.info("adapter %s is in its slot (%.0f ms)", version.fingerprint, 1e3 * seconds)
        hand_over(done)

    def _value(self, version: Version) -> Adapter:
        """The version's value, from memory or from disk."""
        with self._lock:
            adapter = self._memory.get(version)
            entry = self._names.find(version.name)
        if adapter is not None:
            return adapter
        stored = self._reader.read(version.name if entry is None else entry.folder)
        if stored.content != version.content:
            raise CapacityError(
                f"adapter {version.fingerprint} was replaced while it was being loaded",
                "ask again: the new version is served then.",
            )
        with self._lock:
            self._memory.put(version, stored.adapter, self._only_copy)
        return stored.adapter

    def _detach(self, version: Version) -> None:
        try:
            self.place.detach(version)
        except LoralabError:
            logger.exception("adapter %s could not be taken out", version.fingerprint)
        with self._lock:
            self._slots.free(version)
            done = self._schedule()
        self._on_event(StoreEvent("evicted", version.name))
        hand_over(done)

    # what is where ----------------------------------------------------------------------------

    def _refuse(self, entry: Entry, fault: Exception) -> None:
        at_hand = entry.version in self._slots or entry.version in self._memory
        entry.refuse(fault, version_is_at_hand=at_hand)
        served = "" if entry.version is None else f"; {entry.version.fingerprint} serves on"
        logger.warning("adapter %s is refused: %s%s", entry.name, _cause(fault), served)
        self._on_event(StoreEvent("refused", entry.name, detail=_cause(fault)))

    def _only_copy(self, version: Version) -> bool:
        """Whether the folder does not give this version any more, so that memory must keep it."""
        entry = self._names.find(version.name)
        return entry is not None and version == entry.version and entry.refused is not None

    def _state(self, entry: Entry) -> AdapterState:
        version = entry.version
        tier: Tier = "disk"
        if version in self._slots:
            tier = "device"
        elif version in self._memory:
            tier = "memory"
        return AdapterState(
            name=entry.name,
            folder=entry.folder,
            version=version,
            tier=tier,
            pinned=entry.pinned,
            num_leases=self._slots.num_leases(entry.name),
            proof=None if version is None else self._slots.proof(version),
            refused=None if entry.refused is None else _cause(entry.refused),
        )

    def _is_idle(self) -> bool:
        reading = any(entry.reading for entry in self._names.entries())
        return not self._waiting and self._slots.are_steady() and not reading


def _cause(fault: Exception) -> str:
    return fault.cause if isinstance(fault, LoralabError) else f"{type(fault).__name__}: {fault}"


def _closing() -> CapacityError:
    return CapacityError("the server is closing", "ask again in a moment.")
