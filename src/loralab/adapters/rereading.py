"""Reading a folder again that was read and checked before: its bytes alone, into their places.

At the first reading the bytes are what costs least: checksums, names, shapes and settings do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.buffers import fresh_bytes
from loralab.adapters.peft_format import read_folder
from loralab.adapters.peft_names import WEIGHTS_FILE
from loralab.errors import AdapterError


class Place(NamedTuple):
    """Where a tensor is among the bytes of all; the offset counts in numbers of its dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Blueprint:
    """An adapter without its numbers, and where these lie in its file.

    outline: settings, layers, facts and probes; it has no tensors.
    start, num_bytes: of the tensors in the file.
    """

    outline: Adapter
    start: int
    num_bytes: int
    pairs: Mapping[str, tuple[Place, Place]]
    extra: Mapping[str, Place]
    magnitudes: Mapping[str, Place]
    token_rows: Mapping[str, tuple[Tensor, Place]]
    repeated: Mapping[str, Place]

    def read(self, folder: Path) -> Adapter:
        """The adapter in that folder, whose files must be those that the blueprint is of.

        Whoever asks must know that: nothing but the file's length is looked at. Raises
        `AdapterError` where the file is gone or has another length.
        """
        data = self._bytes_of(folder / WEIGHTS_FILE)
        views: dict[torch.dtype, Tensor] = {}

        def view(place: Place) -> Tensor:
            dtype, shape, strides, offset = place
            if dtype not in views:
                whole = self.num_bytes // dtype.itemsize * dtype.itemsize
                views[dtype] = data[:whole].view(dtype)
            return views[dtype].as_strided(shape, strides, offset)

        return replace(
            self.outline,
            pairs={path: (view(A), view(B)) for path, (A, B) in self.pairs.items()},
            extra={name: view(place) for name, place in self.extra.items()},
            magnitudes={path: view(place) for path, place in self.magnitudes.items()},
            token_rows={p: (indices, view(rows)) for p, (indices, rows) in self.token_rows.items()},
            repeated={name: view(place) for name, place in self.repeated.items()},
        )

    def _bytes_of(self, file: Path) -> Tensor:
        data = fresh_bytes(self.num_bytes)
        try:
            with file.open("rb", buffering=0) as handle:
                handle.seek(self.start)
                num_read, more = handle.readinto(data.numpy().data), handle.read(1)
        except OSError as error:
            raise _changed(file, error.strerror or "it cannot be read") from None
        if num_read != self.num_bytes or more:
            raise _changed(file, "it has another length")
        return data


def read_with_blueprint(folder: Path) -> tuple[Adapter, Blueprint | None]:
    """`read_adapter` with `proved_later`, and what reads the same files again in a moment.

    None where the adapter's tensors are not those of the file (grouped convolutions, the output
    projections of packed attention).
    """
    adapter, file = read_folder(folder, proved_later=True)
    if not all(_is_view(tensor, file.data) for tensor in _tensors(adapter)):
        return adapter, None

    def place(tensor: Tensor) -> Place:
        offset = (tensor.data_ptr() - file.data.data_ptr()) // tensor.itemsize
        return Place(tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)

    return adapter, Blueprint(
        replace(adapter, pairs={}, extra={}, magnitudes={}, token_rows={}, repeated={}),
        file.start,
        len(file.data),
        pairs={path: (place(A), place(B)) for path, (A, B) in adapter.pairs.items()},
        extra={name: place(tensor) for name, tensor in adapter.extra.items()},
        magnitudes={path: place(tensor) for path, tensor in adapter.magnitudes.items()},
        token_rows={p: (indices, place(rows)) for p, (indices, rows) in adapter.token_rows.items()},
        repeated={name: place(tensor) for name, tensor in adapter.repeated.items()},
    )


def _tensors(adapter: Adapter) -> Iterator[Tensor]:
    for A, B in adapter.pairs.values():
        yield from (A, B)
    for table in (adapter.extra, adapter.magnitudes, adapter.repeated):
        yield from table.values()
    yield from (rows for _, rows in adapter.token_rows.values())


def _is_view(tensor: Tensor, data: Tensor) -> bool:
    """Whether the tensor lies in these bytes in one piece, at a multiple of its dtype's size."""
    start = tensor.data_ptr() - data.data_ptr()
    inside = start >= 0 and start + tensor.nbytes <= data.nbytes
    return inside and start % tensor.itemsize == 0 and tensor.is_contiguous()


def _changed(file: Path, why: str) -> AdapterError:
    return AdapterError(
        f"{file} changed while it was read ({why})", "write adapters aside and rename their folder."
    )
