"""A server's pair: an adapter in the base's own weights, and the base's own bytes back.

Whole tensors are swapped; nothing is ever subtracted back. What was there waits in memory, or in
the files it was loaded from.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from loralab.adapters.checkpoint_files import DTYPES, Entry, read_entries, read_tensor
from loralab.adapters.extracting import collect
from loralab.adapters.merge import changed_tensors, check_not_merged, put_all, table_of
from loralab.adapters.mixing import some, tensors_of
from loralab.errors import ModelError


@dataclass
class _Base:
    """What `restore` puts back: the base's tensors, some of them without their bytes.

    files: name -> where in `folder` the bytes are, and their CRC-32.
    """

    kept: Mapping[str, Tensor]
    folder: Path | None = None
    files: dict[str, tuple[Entry, int]] = field(default_factory=dict)


def merge_in_place(model: nn.Module, name: str, *, base_folder: str | Path | None = None) -> None:
    """Puts the adapter into the base's weights until `restore`; its route then adds nothing more.

    base_folder: the base's safetensors files, from which `restore` shall read; each tensor is
        compared with them first. Without it the base's own tensors are kept in memory (as many
        bytes as the adapter changes).

    Raises `AdapterError` where an adapter is merged already, `ModelError` where the folder does not
    hold exactly the base; the model is as before then.
    """
    check_not_merged(model)
    changed = changed_tensors(model, collect(model, name, Tensor.detach))
    files = {} if base_folder is None else _found_in(Path(base_folder), model, changed)
    base = _Base(put_all(model, changed), None if base_folder is None else Path(base_folder), files)
    _let_go(model, base)
    model.__dict__["_loralab_merged"] = (name, base)


def restore(model: nn.Module) -> None:
    """Gives the base its own tensors back, bit for bit. Nothing happens where none is merged.

    Raises `ModelError` where they were left to files and these have changed; the adapter stays
    merged then.
    """
    _, base = model.__dict__.get("_loralab_merged", (None, _Base({})))
    _fetch_back(base)
    owners = dict(model.named_modules(remove_duplicate=False))
    for full_name, tensor in base.kept.items():
        path, _, key = full_name.rpartition(".")
        table_of(owners[path], key)[key] = tensor
    model.__dict__.pop("_loralab_merged", None)


def _found_in(folder: Path, model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Entry, int]]:
    """Where the folder holds the model's tensors of these names, under any name they are tied to.

    Raises `ModelError` that names those it does not hold bit for bit.
    """
    entries, own = read_entries(folder), tensors_of(model)
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(id(tensor), []).append(name)
    found, other = {}, []
    for name in names:
        entry = next((entries[n] for n in tied[id(own[name])] if n in entries), None)
        stored = None if entry is None or entry.dtype not in DTYPES else read_tensor(folder, entry)
        if entry is not None and stored is not None and _same_bits(stored, own[name]):
            found[name] = entry, zlib.crc32(_bytes(stored))
        else:
            other.append(name)
    if other:
        raise ModelError(
            f"{folder} does not hold this model bit for bit: {some(other)}",
            "give the folder the model was loaded from, in its dtype, or none, so that the base is"
            " kept in memory.",
        )
    return found


def _let_go(model: nn.Module, base: _Base) -> None:
    """Frees the base's tensors that are in files, and that nothing of the model still uses."""
    used = {id(tensor) for tensor in tensors_of(model).values()}
    for name in list(base.files):
        tensor = base.kept[name]
        if id(tensor) in used:
            del base.files[name]
        else:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _fetch_back(base: _Base) -> None:
    """Reads what files keep; all of it is checked before any of it is used."""
    if base.folder is None:
        return
    read = {name: read_tensor(base.folder, entry) for name, (entry, _) in base.files.items()}
    changed = [
        name for name, tensor in read.items() if zlib.crc32(_bytes(tensor)) != base.files[name][1]
    ]
    if changed:
        raise ModelError(
            f"{base.folder} has changed since the adapter was merged: {some(changed)}",
            "load the model again; the adapter is still merged into this one.",
        )
    for name, tensor in read.items():
        base.kept[name].data = tensor.to(base.kept[name].device)


def _same_bits(stored: Tensor, own: Tensor) -> bool:
    alike = stored.dtype == own.dtype and stored.shape == own.shape
    return alike and _bytes(stored) == _bytes(own.detach().cpu().contiguous())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
