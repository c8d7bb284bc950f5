"""Writing that never leaves a half: aside first, then one rename; and where the cache is."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import platformdirs

from loralab.errors import OutputError


def cache_folder() -> Path:
    """Where fetched files lie: `LORALAB_CACHE`, else the platform's user cache."""
    chosen = os.environ.get("LORALAB_CACHE")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("loralab")
    return folder.absolute()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; it takes `path`'s place at the end.

    On any error the place aside is removed and `path` is as it was. A full disk or a folder that
    may not be written becomes an `OutputError` that names the place.
    """
    aside = path.with_name(f".{path.name}.{uuid4().hex[:8]}.aside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _flush(aside)
        if path.is_dir() and aside.is_dir():
            _swap_folders(aside, path)
        else:
            aside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        _remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document, whole or not at all; numbers that are not finite are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, text)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The `OutputError` for an operating-system error at `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path}: the disk is full; nothing half-written was left",
            "free some space (or choose another place with --output) and start the command again.",
        )
    return OutputError(
        f"{path}: cannot write ({error.strerror or error})",
        "check the path and its permissions, or choose another place with --output.",
    )


def _flush(path: Path) -> None:
    """Bring contents to the disk before the rename, so that a power cut leaves old or new."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _swap_folders(aside: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{uuid4().hex[:8]}.old")
    path.rename(old)
    aside.rename(path)
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
