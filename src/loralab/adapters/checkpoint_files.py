"""Safetensors files as tables of byte ranges, and tensors that are views of mapped bytes."""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        start, header = _header(file)
        room = file.stat().st_size - start
        for name, told in header.items():
            if name == "__metadata__":
                continue
            first, last = told["data_offsets"]
            if name in entries or not 0 <= first <= last <= room:
                raise _damaged(file, f"at tensor {name!r}")
            entries[name] = Entry(
                file.name, start + first, start + last, told["dtype"], tuple(told["shape"])
            )
    return entries


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors' bytes start, what the header says)."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            raise _damaged(file, "in the length of its header")
        try:
            return 8 + length, json.loads(handle.read(length))
        except ValueError:
            raise _damaged(file, "in its header") from None


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


def hash_entries(folder: Path, entries: Mapping[str, Entry]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name}|{DTYPES.get(entry.dtype, entry.dtype)}|{entry.shape}|".encode())
        with (folder / entry.file).open("rb") as handle:
            handle.seek(entry.start)
            left = entry.stop - entry.start
            while left and (chunk := handle.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
