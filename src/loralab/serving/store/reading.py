"""From a folder to a value: everything that can be known before is checked before it is read."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loralab.adapters import Adapter, content_hash, outline_adapter, read_adapter
from loralab.errors import AdapterError
from loralab.serving.store.registry import FILES, Registry, Stamp

MIB = 2**20
SETTLING_SECONDS = 0.1  # between looks at a folder that is being written
ATTEMPTS = 5


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


def read_checked(
    registry: Registry,
    name: str,
    limits: Limits,
    misfits: Callable[[Adapter], list[str]],
    known: Mapping[Stamp, str] | None = None,
) -> Stored:
    """Reads the adapter in that folder.

    known: content hashes of what was checked before, by stamp: it is neither checked nor hashed
    once more.

    Sizes of files, settings, names, shapes and ranks are compared with the limits and with the
    model (`misfits`) before any tensor is read. A folder that changes meanwhile is read again.

    Raises `AdapterError` that lists everything that is wrong, or as `Registry.folder` does.
    """
    for _ in range(ATTEMPTS):
        stamp = registry.stamp(name)
        folder = registry.folder(name)
        try:
            if known is not None and stamp in known:
                found = _stored(read_adapter(folder, proved_later=True), known[stamp], stamp)
            else:
                found = _read(folder, name, stamp, limits, misfits)
        except AdapterError as error:
            found = error
        if registry.stamp(name) == stamp:
            if isinstance(found, AdapterError):
                raise found
            return found
        time.sleep(SETTLING_SECONDS)
    raise AdapterError(
        f"adapter {name!r} changed while it was read, {ATTEMPTS} times in a row",
        "write it to a folder aside and rename that folder.",
    )


def _read(
    folder: Path,
    name: str,
    stamp: Stamp,
    limits: Limits,
    misfits: Callable[[Adapter], list[str]],
) -> Stored:
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
        faults += misfits(outline)
        if not faults:
            adapter = read_adapter(folder, proved_later=True)
            return _stored(adapter, content_hash(adapter), stamp)
    shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
    raise AdapterError(
        "\n  - ".join([f"adapter {name!r} cannot be served here", *shown]),
        "serve it on the base that it was made for; nothing of it was read.",
    )


def _stored(adapter: Adapter, content: str, stamp: Stamp) -> Stored:
    sizes = {file: size for file, _, size, _, _ in stamp.files}
    return Stored(adapter, content, stamp, sizes[FILES[1]], _rank(adapter))


def _rank(adapter: Adapter) -> int:
    return max((A.shape[0] for A, _ in adapter.pairs.values()), default=0)
