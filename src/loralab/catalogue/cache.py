"""The cache: folders of raw files, each file checked by its hash, cheaply on later uses."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from loralab.catalogue.entries import Archive, File
from loralab.files import cache_folder

_STAMP = ".verified.json"


def archive_folder(archive: Archive) -> Path:
    """The folder of the archive's files, whether it is there yet or not."""
    return cache_folder() / "catalogue" / archive.key


def is_whole(folder: Path, archive: Archive) -> bool:
    """Whether every file of the archive lies in `folder` with the bytes it must have.

    A file is hashed at first use and whenever its size or times have changed since.
    """
    stamps = _read_stamps(folder)
    fresh: dict[str, list[int]] = {}
    for file in archive.files:
        stamp = _stamp(folder / file.name)
        if stamp is None:
            return False
        if stamp != stamps.get(file.name) and not has_right_bytes(folder / file.name, file):
            return False
        fresh[file.name] = stamp
    if fresh != stamps:
        _write_stamps(folder, fresh)
    return True


def has_right_bytes(path: Path, file: File) -> bool:
    """Whether the file at `path` has the size and the SHA-256 it must have."""
    try:
        if path.stat().st_size != file.num_bytes:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    except OSError:
        return False


def _stamp(path: Path) -> list[int] | None:
    """Size and times: ctime changes even where a writer puts mtime back."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_stamps(folder: Path) -> dict[str, list[int]]:
    try:
        stamps = json.loads((folder / _STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write_stamps(folder: Path, stamps: dict[str, list[int]]) -> None:
    # Stamps only save time: a cache that cannot be written to is hashed at each use.
    with contextlib.suppress(OSError):
        handle, aside = tempfile.mkstemp(prefix=_STAMP, dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(stamps, stream)
            Path(aside).replace(folder / _STAMP)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise
