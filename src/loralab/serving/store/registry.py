"""The folder that adapters are served from, and nothing outside it."""

import re
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from loralab.errors import AdapterError, ForbiddenError, UnknownAdapterError, nearest

FILES: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors", "probes.json")
NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_-])?"
WHAT_A_NAME_IS = (
    "one to 96 letters, digits, `_`, `-` and `.`, not beginning with `-` or `.`, without slashes"
)


def is_name(name: str) -> bool:
    """Whether adapters may be called that: one plain component of a path, on every system."""
    return re.fullmatch(NAME, name) is not None


SETTLED_SECONDS = 2.0  # the coarsest clock that file systems put on a file


@dataclass(frozen=True)
class Stamp:
    """What tells a folder's content apart without reading it: each file's identity, size, times.

    A change gives another stamp: a file's change time moves even where a writer puts the
    modification time back.

    settled: when the stamp was taken the files had been left alone for so long that no later write
        can have the same time. Until then two contents may have one stamp.
    """

    files: tuple[tuple[str, int, int, int, int], ...]
    settled: bool = field(compare=False)


class Registry:
    """Subfolders of one root, each an adapter in PEFT's format, named as the folder is."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise AdapterError(
                f"{root} is no folder of adapters",
                "give a folder whose subfolders hold adapter_config.json and"
                " adapter_model.safetensors.",
            )
        self.root = self.root.resolve()

    def names(self) -> list[str]:
        """The adapters that are there now, sorted; what is no adapter is left out."""
        return sorted(
            path.name
            for path in self.root.iterdir()
            if is_name(path.name) and (path / FILES[0]).is_file() and self._inside(path)
        )

    def folder(self, name: str) -> Path:
        """The adapter's folder, with all links followed.

        Raises `ForbiddenError` for what is no plain name or leads out of the root,
        `UnknownAdapterError` where there is nothing.
        """
        if not is_name(name):
            raise ForbiddenError(
                f"{name[:120]!r} names no folder under the server's adapters",
                f"a name is {WHAT_A_NAME_IS}.",
            )
        path = self.root / name
        if not path.is_dir():
            raise UnknownAdapterError(f"there is no adapter {name!r}", self._hint(name))
        if not self._inside(path):
            raise ForbiddenError(
                f"{name!r} is a link that leads out of the server's adapters",
                "copy the adapter into the folder instead.",
            )
        return path.resolve()

    def stamp(self, name: str) -> Stamp:
        """The folder's stamp. Raises as `folder`, and `ForbiddenError` for files that are none.

        A link out of the folder, a pipe or a device in the place of a file is never opened.
        """
        folder = self.folder(name)
        found, now = [], time.time()
        for file in FILES:
            path = folder / file
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(facts.st_mode) or not self._inside(path):
                raise ForbiddenError(
                    f"{name}/{file} is no plain file of the server's adapters",
                    "replace it by the file itself.",
                )
            identity = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
            found.append((file, *identity))
        if not found:
            raise UnknownAdapterError(f"{name!r} holds no adapter", self._hint(name))
        newest = max(change_time for *_, change_time in found) / 1e9
        return Stamp(tuple(found), settled=now - newest > SETTLED_SECONDS)

    def _inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self.root)
        except (OSError, RuntimeError):  # a link that leads nowhere, or round in circles
            return False

    def _hint(self, name: str) -> str:
        known = self.names()
        return nearest(name, known) if known else "the server's folder holds no adapters."
