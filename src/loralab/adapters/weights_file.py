"""A safetensors file: its header strictly checked, its tensors views of one piece of memory.

The library's own reader copies every tensor once more, which is most of what loading would cost.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from loralab.adapters.buffers import fresh_bytes

CHECKSUM = "loralab.checksum"
UNSET = 16 * "0"  # stands in the checksum's place while it is computed
MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class Span(NamedTuple):
    """A tensor's bytes, counted from the end of the header, and what they are."""

    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    header_checksum: int
    start: int  # of the tensors' bytes in the file
    data: Tensor  # these bytes, which all tensors are views of
    digest: Future[tuple[int, bool]]  # made in a thread of its own while the tensors are sorted

    def is_intact(self) -> bool:
        """Whether the file has a checksum and agrees with it."""
        found = _checksum(self.header_checksum, self.digest.result()[0])
        return self.metadata.get(CHECKSUM) == found

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf."""
        _, finite = self.digest.result()
        if finite and all(tensor.dtype == torch.float32 for tensor in self.tensors.values()):
            return []
        floating = {name: t for name, t in self.tensors.items() if t.is_floating_point()}
        return [name for name, value in floating.items() if not bool(value.isfinite().all())]


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes, with two CRC-32 over all of them (their own place zero) in the metadata.

    The same contents give the same bytes: the library alone would put the metadata in any order.
    """
    data = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    entries = {**metadata, CHECKSUM: UNSET}
    named = {"__metadata__": dict(sorted(entries.items())), **json.loads(data[8:start])}
    text = json.dumps(named, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # as the library aligns the tensors
    header, values = len(text).to_bytes(8, "little") + text, memoryview(data)[start:]
    found = _checksum(zlib.crc32(header), zlib.crc32(values))
    return header.replace(_entry(UNSET), _entry(found), 1) + values


def read(file: Path) -> WeightsFile:
    """Reads a file. Raises `ValueError` that says what is damaged, `OSError` as opening does."""
    with file.open("rb") as handle:
        prefix, header, num_bytes = _read_header(handle, MAX_HEADER_BYTES)
        data = fresh_bytes(num_bytes)
        buffer = data.numpy().data
        worker = ThreadPoolExecutor(1)
        filled = worker.submit(handle.readinto, buffer)
        digest = worker.submit(_digest, buffer)
        worker.shutdown(wait=False)
        try:
            spans, metadata = parse_header(header, len(data))
            tensors = {name: _view(buffer, span) for name, span in spans.items()}
        finally:
            num_read = filled.result()
    if num_read != len(data):
        raise ValueError("it ends before its header says")
    zeroed = header.replace(_entry(metadata.get(CHECKSUM, UNSET)), _entry(UNSET), 1)
    checksum, start = zlib.crc32(prefix + zeroed), len(prefix) + len(header)
    return WeightsFile(tensors, metadata, checksum, start, data, digest)


def read_header(
    file: Path, max_bytes: int = MAX_HEADER_BYTES
) -> tuple[dict[str, Span], dict[str, str]]:
    """(tensors, metadata) as the header has them; no tensor is read. Raises as `read` does."""
    with file.open("rb") as handle:
        _, header, num_bytes = _read_header(handle, max_bytes)
        return parse_header(header, num_bytes)


def _read_header(handle: BinaryIO, max_bytes: int) -> tuple[bytes, bytes, int]:
    """(the header's length as it stands there, the header, how many bytes of tensors follow)."""
    size = os.fstat(handle.fileno()).st_size
    prefix = handle.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, max_bytes):
        raise ValueError(f"its header says {length} bytes, the file has {size}")
    return prefix, handle.read(length), size - 8 - length


def _digest(buffer: memoryview) -> tuple[int, bool]:
    """(CRC-32 of the bytes, whether they have a finite sum as numbers of 32 bits).

    Such a sum has no NaN and no Inf in it. One that is not finite may also have overflowed.
    """
    checksum = zlib.crc32(buffer)
    if not buffer.nbytes or buffer.nbytes % 4:
        return checksum, False
    with np.errstate(over="ignore", invalid="ignore"):
        return checksum, bool(np.isfinite(np.frombuffer(buffer, np.float32).sum()))


def parse_header(header: bytes, num_bytes: int) -> tuple[dict[str, Span], dict[str, str]]:
    """(tensors, metadata) of a header before so many bytes of tensors.

    Raises `ValueError` for whatever is not as the format has it: names that stand twice, sizes that
    disagree with shapes, bytes that belong to no tensor or to two.
    """
    try:
        told = json.loads(header, object_pairs_hook=unrepeated)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(told, dict):
        raise ValueError("its header is no table")
    metadata = told.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    spans = {name: _span(name, entry) for name, entry in told.items()}
    end = 0
    for span in sorted(spans.values()):
        if span.start != end:
            raise ValueError(f"byte {min(span.start, end)} belongs to two tensors or to none")
        end = span.stop
    if end != num_bytes:
        raise ValueError(f"its tensors take {end} bytes, the file holds {num_bytes}")
    return spans, metadata


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table. Raises `ValueError` for names that stand twice, of which one would win."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names that stand twice: {', '.join(twice)}")
    return table


def _span(name: str, entry: Any) -> Span:
    try:
        (start, stop), kind, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
        size = DTYPES[kind].itemsize
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor {name!r} is described as {str(entry)[:200]}") from None
    numbers = (start, stop, *shape)
    if set(map(type, numbers)) != {int} or not 0 <= min(numbers) <= max(numbers) < 2**48:
        raise ValueError(f"tensor {name!r} has the shape {shape} from {start} to {stop}")
    if stop - start != size * math.prod(shape):
        raise ValueError(f"tensor {name!r}: {stop - start} bytes, of {kind} with shape {shape}")
    return Span(start, stop, kind, shape)


def _view(buffer: memoryview, span: Span) -> Tensor:
    dtype = DTYPES[span.dtype]
    count = math.prod(span.shape)
    if not count:
        return torch.empty(span.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=span.start).view(span.shape)


def _checksum(header: int, data: int) -> str:
    return f"{header:08x}{data:08x}"


def _entry(checksum: str) -> bytes:
    """The checksum as it stands in the header."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()
