"""From a folder to a value: everything that can be known before is checked before it is read."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from loralab.adapters import (
    Adapter,
    Blueprint,
    collector_paused,
    content_hash,
    outline_adapter,
    read_with_blueprint,
)
from loralab.errors import AdapterError
from loralab.serving.store.registry import FILES, Registry, Stamp

MIB = 2**20
SETTLING_SECONDS = 0.1  # between looks at a folder that is being written
ATTEMPTS = 5
MOST_CONTENTS, MOST_BLUEPRINTS = 100_000, 256  # some 300 bytes, and 200 kB, each
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What an adapter may be at most: its largest rank, and its files in bytes."""

    rank: int = 256
    weights_bytes: int = 2048 * MIB
    config_bytes: int = MIB
    probes_bytes: int = 8 * MIB


@dataclass(frozen=True, eq=False)
class Stored:
    """An adapter as it was read: content is `content_hash`, stamp that of the files it came of."""

    adapter: Adapter
    content: str
    stamp: Stamp
    num_bytes: int
    rank: int


class Reader:
    """Reads the registry's folders; safe between threads.

    misfits: what keeps an adapter of these names and shapes from being served.

    It remembers what it read by the files' stamps, as long as these were settled. A folder whose
    stamp is known was read, checked and hashed before, and has not been written to since: of such a
    folder the tensors alone are read.
    """

    def __init__(
        self, registry: Registry, limits: Limits, misfits: Callable[[Adapter], list[str]]
    ) -> None:
        self.registry, self.limits, self.misfits = registry, limits, misfits
        self._contents: OrderedDict[Stamp, str] = OrderedDict()
        self._blueprints: OrderedDict[Stamp, Blueprint] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str) -> Stored:
        """The adapter in that folder.

        Sizes of files, settings, names, shapes and ranks are compared with the limits and with the
        model before any tensor is read. A folder that changes meanwhile is read again.

        Raises `AdapterError` that lists everything that is wrong, or as `Registry.folder` does.
        """
        for _ in range(ATTEMPTS):
            stamp = self.registry.stamp(name)
            try:
                found = self._read(name, stamp)
            except AdapterError as error:
                found = error
            if self.registry.stamp(name) == stamp:
                if isinstance(found, AdapterError):
                    raise self._named(found, name)
                return found
            time.sleep(SETTLING_SECONDS)
        raise AdapterError(
            f"adapter {name!r} changed while it was read, {ATTEMPTS} times in a row",
            "write it to a folder aside and rename that folder.",
        )

    def _named(self, fault: AdapterError, name: str) -> AdapterError:
        """The fault as it may be told to clients: where the server's files lie is not theirs."""
        folder = str(self.registry.folder(name))
        return type(fault)(fault.cause.replace(folder, f"adapter {name!r}"), fault.next_step)

    def _read(self, name: str, stamp: Stamp) -> Stored:
        folder = self.registry.folder(name)
        with self._lock:
            content = _used(self._contents, stamp)
            blueprint = _used(self._blueprints, stamp)
        if content is not None and blueprint is not None:
            with collector_paused():
                return _stored(blueprint.read(folder), content, stamp)
        if content is None:
            self._check_outline(folder, name, stamp)
        adapter, blueprint = read_with_blueprint(folder)
        stored = _stored(adapter, content or content_hash(adapter), stamp)
        if stamp.settled:
            with self._lock:
                _keep(self._contents, stamp, stored.content, MOST_CONTENTS)
                if blueprint is not None:
                    _keep(self._blueprints, stamp, blueprint, MOST_BLUEPRINTS)
        return stored

    def _check_outline(self, folder: Path, name: str, stamp: Stamp) -> None:
        limits = self.limits
        most = (limits.config_bytes, limits.weights_bytes, limits.probes_bytes)
        caps: dict[str, int] = dict(zip(FILES, most, strict=True))
        sizes = {file: size for file, _, size, _, _ in stamp.files}
        faults = [
            f"{file} has {size} bytes, at most {caps[file]} are read"
            for file, size in sizes.items()
            if size > caps[file]
        ]
        if not faults:
            outline = outline_adapter(folder)
            rank = _rank(outline)
            if rank > limits.rank:
                faults.append(f"its rank is {rank}, this server takes at most {limits.rank}")
            faults += self.misfits(outline)
        if not faults:
            return
        shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise AdapterError(
            "\n  - ".join([f"adapter {name!r} cannot be served here", *shown]),
            "serve it on the base that it was made for; nothing of it was read.",
        )


def _used(kept: OrderedDict[Stamp, T], stamp: Stamp) -> T | None:
    if stamp in kept:
        kept.move_to_end(stamp)
    return kept.get(stamp)


def _keep(kept: OrderedDict[Stamp, T], stamp: Stamp, value: T, most: int) -> None:
    """The least recently used makes room."""
    kept[stamp] = value
    if len(kept) > most:
        kept.popitem(last=False)


def _stored(adapter: Adapter, content: str, stamp: Stamp) -> Stored:
    sizes = {file: size for file, _, size, _, _ in stamp.files}
    return Stored(adapter, content, stamp, sizes[FILES[1]], _rank(adapter))


def _rank(adapter: Adapter) -> int:
    return max((A.shape[0] for A, _ in adapter.pairs.values()), default=0)
