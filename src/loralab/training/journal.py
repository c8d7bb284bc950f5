"""A file of JSON lines that a resumed run continues as if it had never stopped.

A checkpoint keeps the journal's `Mark` (length and hash). Rows written after it belong to steps
that will be done again, so resuming cuts the file back to the mark.
"""

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import ResumeError
from loralab.files import cannot_write


@dataclass(frozen=True)
class Mark:
    """A place in a journal: everything before it is final."""

    num_bytes: int
    sha256: str


START = Mark(0, hashlib.sha256().hexdigest())


class Journal:
    """Appends rows to `path`, which is first cut back to `mark`.

    Raises `ResumeError` where the file is shorter than the mark or differs before it, and
    `OutputError` where it cannot be written.
    """

    def __init__(self, path: Path, mark: Mark = START) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._hash = _hash_head(path, mark)
            os.truncate(path, mark.num_bytes)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from error
        self._num_bytes = mark.num_bytes

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite are refused."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._hash.update(line)
        self._num_bytes += len(line)

    def mark(self) -> Mark:
        """The present end, with the rows before it brought to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return Mark(self._num_bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _hash_head(path: Path, mark: Mark) -> "hashlib._Hash":
    with path.open("rb") as file:
        head = file.read(mark.num_bytes)
    digest = hashlib.sha256(head)
    if len(head) < mark.num_bytes or digest.hexdigest() != mark.sha256:
        raise ResumeError(
            f"{path} is not the file that the checkpoint belongs to: its first "
            f"{mark.num_bytes} bytes were changed or cut off",
            "put the file back as it was, or start a new run in another folder.",
        )
    return digest
