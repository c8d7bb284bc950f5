"""Safetensors files as tables of byte ranges, and tensors that are views of mapped bytes."""

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from loralab.adapters.weights_file import MAX_HEADER_BYTES, Span, parse_header
from loralab.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes are: in which file of the folder, from which byte to which."""

    file: str
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors files. Raises `ModelError` for damage and for none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} holds no safetensors checkpoint",
            "give a model's folder with model.safetensors or its shards.",
        )
    entries: dict[str, Entry] = {}
    for file in files:
        start, spans = _header(file)
        for name, (first, last, dtype, shape) in spans.items():
            if name in entries:
                raise _damaged(file, f"at tensor {name!r}, which stands in another file too")
            entries[name] = Entry(file.name, start + first, start + last, dtype, shape)
    return entries


def _header(file: Path) -> tuple[int, dict[str, Span]]:
    """(where the tensors' bytes start, what the header says of each)."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(file, "in the length of its header")
        try:
            return 8 + length, parse_header(handle.read(length), size - 8 - length)[0]
        except ValueError as error:
            raise _damaged(file, f"in its header: {error}") from None


def _damaged(file: Path, where: str) -> ModelError:
    return ModelError(f"{file} is damaged {where}", "fetch the file again.")


@contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """The file's bytes, to be read and written over; views of them must be gone at the end."""
    with file.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as buffer:
        yield buffer


def view(buffer: mmap.mmap, entry: Entry) -> Tensor:
    """The tensor as a view of the mapped bytes: what is written to it is written to the file."""
    dtype = DTYPES[entry.dtype]
    count = (entry.stop - entry.start) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


def copy_bytes(folder: Path, entry: Entry, to: BinaryIO) -> None:
    """Writes the tensor's bytes to a file that is open, a chunk at a time."""
    for chunk in _chunks(folder, entry):
        to.write(chunk)


def read_tensor(folder: Path, entry: Entry) -> Tensor:
    """The tensor, in memory of its own. Raises `ModelError` where the file is gone or too short."""
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    try:
        with (folder / entry.file).open("rb") as handle:
            handle.seek(entry.start)
            whole = handle.readinto(data.numpy().data) == len(data)
    except OSError as error:
        raise ModelError(f"{folder / entry.file}: {error.strerror}", "bring it back.") from None
    if not whole:
        raise _damaged(folder / entry.file, "at its end")
    return data.view(DTYPES[entry.dtype]).view(entry.shape)


def hash_entries(folder: Path, entries: Mapping[str, Entry]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name}|{DTYPES.get(entry.dtype, entry.dtype)}|{entry.shape}|".encode())
        for chunk in _chunks(folder, entry):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(folder: Path, entry: Entry) -> Iterator[bytes]:
    with (folder / entry.file).open("rb") as handle:
        handle.seek(entry.start)
        left = entry.stop - entry.start
        while left and (chunk := handle.read(min(left, CHUNK_BYTES))):
            yield chunk
            left -= len(chunk)
