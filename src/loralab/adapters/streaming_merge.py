"""Merging a checkpoint on disk, block by block: the model never is in memory.

The base's files are copied as they are, headers included, and the bytes of changed tensors are then
written over in the copy. What the base's files lack is written to one more (`checkpoint_target`).
"""

import mmap
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.certificate import LIMIT, MergeCertificate, check_limit
from loralab.adapters.checkpoint_files import (
    DTYPES,
    Entry,
    hash_entries,
    mapped,
    read_entries,
    view,
)
from loralab.adapters.checkpoint_target import Target, target_of, write_target
from loralab.adapters.layers import path_of
from loralab.adapters.merge import CERTIFICATE_FILE, model_card
from loralab.adapters.merging import (
    Change,
    WeightError,
    change_at,
    check_mergeable,
    weight_error,
    weight_name,
)
from loralab.adapters.mixing import some
from loralab.adapters.peft_format import content_hash, read_adapter
from loralab.errors import AdapterError, OutputError
from loralab.files import replacing, write_json, write_text

BLOCK_ELEMENTS = 1 << 24  # of a weight that are merged at once: 64 MiB in fp32
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def merge_checkpoint(
    base_folder: str | Path,
    adapter_folder: str | Path,
    out_folder: str | Path,
    *,
    limit: float | None = None,
    force: bool = False,
) -> MergeCertificate:
    """Merges an adapter's folder into a (sharded) safetensors checkpoint: a new folder.

    Memory stays below the largest shard plus 1 GiB, whatever the model's size. Each weight is
    `W + delta` in fp32, rounded once to the file's dtype. The new folder holds everything else of
    the base's folder (config, tokenizer), a model card and the certificate; it appears whole or not
    at all. Raises `ModelError` for a folder that is no such checkpoint, `AdapterError` for an
    adapter that does not fit it (all faults at once) or would lose more than `limit` of its effect
    (unless `force`), `OutputError` for a place that is taken.
    """
    base, out = Path(base_folder), Path(out_folder)
    if out.exists():
        raise OutputError(f"{out} exists already", "choose another folder.")
    adapter = read_adapter(adapter_folder)
    entries = read_entries(base)
    target, weights = _fit(base, adapter, entries)
    with replacing(out) as aside:
        _copy(base, aside, target.renamed)
        write_target(aside, base, target)
        found = WeightError()
        for weight in weights:
            with mapped(aside / target.entries[weight.name].file) as buffer:
                found += _merge(buffer, target.entries[weight.name], weight)
        for name, tensor in adapter.extra.items():
            with mapped(aside / target.entries[name].file) as buffer:
                view(buffer, target.entries[name]).copy_(tensor)
        for path, (rows, values) in adapter.token_rows.items():
            for name in target.rows[f"{path}.weight"]:
                with mapped(aside / target.entries[name].file) as buffer:
                    table = view(buffer, target.entries[name])
                    table[rows] = values.to(table.dtype)
                    del table
        certificate = _certificate(base, adapter, entries, target, weights, found, limit, force)
        check_limit(certificate, str(adapter_folder))
        write_json(aside / CERTIFICATE_FILE, certificate.to_dict())
        write_text(aside / "README.md", model_card(certificate))
    return certificate


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight that changes. direct: its first dimension holds the outputs."""

    name: str
    change: Change
    direct: bool

    def blocks(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, Change]]:
        """Ranges of the weight's first dimension with the change of each."""
        elements = max(1, torch.Size(shape[1:]).numel())
        height = max(1, BLOCK_ELEMENTS // elements)
        if not self.direct and self.change.magnitude is not None:
            height = shape[0]  # the norm of an output goes over all of it
        for start in range(0, shape[0], height):
            stop = min(start + height, shape[0])
            whole = stop - start == shape[0]
            part = self.change.rows if self.direct else self.change.columns
            yield slice(start, stop), self.change if whole else part(start, stop)


def _merge(buffer: mmap.mmap, entry: Entry, weight: _Weight) -> WeightError:
    """Writes the merged weight over the base's, and measures it."""
    found = WeightError()
    values = view(buffer, entry).flatten(1)
    for rows, change in weight.blocks(entry.shape):
        old = values[rows].clone()
        total = torch.empty_like(old, dtype=torch.promote_types(old.dtype, torch.float32))
        change.add(_oriented(old, weight), _oriented(total, weight))
        values[rows] = total.to(old.dtype)
        found += weight_error(_oriented(old, weight), _oriented(values[rows], weight), change)
    return found


def _oriented(values: Tensor, weight: _Weight) -> Tensor:
    return values if weight.direct else values.mT


def _fit(
    base: Path, adapter: Adapter, entries: Mapping[str, Entry]
) -> tuple[Target, list[_Weight]]:
    """The target, and the weights that change.

    Raises `AdapterError` that lists everything that does not fit.
    """
    check_mergeable(adapter)
    faults: list[str] = []
    target = target_of(base, adapter, entries, faults)
    weights = []
    modules = dict(target.model.named_modules())
    for path, (A, B) in adapter.pairs.items():
        module = modules.get(path)
        way = None if module is None else path_of(module)
        if module is None or way is None:
            faults.append(f"{path}: the model has no such module that can be adapted")
            continue
        name = f"{path}.{weight_name(module)}"
        entry, shape = target.entries.get(name), (B.shape[0], A.shape[1])
        if entry is None or entry.dtype not in DTYPES:
            faults.append(f"{name}: not in the checkpoint in a dtype that can be merged")
        elif (
            way.features(module) != shape
            or entry.shape != module.get_parameter(name.rpartition(".")[2]).shape
        ):
            faults.append(f"{name}: delta of {shape}, weight of {entry.shape}")
        else:
            direct = way.matrix(module).stride(-1) == 1
            weights.append(_Weight(name, change_at(adapter, path), direct))
    faults += _faults_of_whole(adapter, target)
    if faults:
        shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise AdapterError(
            "\n  - ".join(["the adapter does not fit the checkpoint", *shown]),
            "give the checkpoint it was trained on, or load the model as it was trained (with its"
            " head) and use `loralab.merge`.",
        )
    return target, weights


def _faults_of_whole(adapter: Adapter, target: Target) -> list[str]:
    faults = []
    for name, tensor in adapter.extra.items():
        entry = target.entries.get(name)
        if entry is None:
            continue  # named already
        if entry.dtype not in DTYPES or entry.shape != tuple(tensor.shape):
            shape = f"{entry.dtype} {entry.shape}"
            faults.append(f"{name}: {tuple(tensor.shape)}, in the checkpoint {shape}")
    missing = [path for path in adapter.token_rows if f"{path}.weight" not in target.rows]
    if missing:
        faults.append(f"token rows of {some(missing)}: the checkpoint has no such embedding")
    return faults


def _copy(base: Path, out: Path, renamed: Mapping[str, str]) -> None:
    """Everything of the base's folder but weights in other formats and hidden files."""
    out.mkdir()
    for file in sorted(base.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix not in OTHER_WEIGHTS:
            shutil.copyfile(file, out / renamed.get(file.name, file.name))


def _certificate(
    base: Path,
    adapter: Adapter,
    entries: Mapping[str, Entry],
    target: Target,
    weights: list[_Weight],
    found: WeightError,
    limit: float | None,
    force: bool,
) -> MergeCertificate:
    dtypes = {
        str(DTYPES[target.entries[weight.name].dtype]).removeprefix("torch.") for weight in weights
    }
    wanted = LIMIT if limit is None else limit
    return MergeCertificate(
        dtype="+".join(sorted(dtypes)) or "none",
        relative_error=found.relative,
        unchanged_share=found.unchanged_share,
        num_weights=found.num_weights,
        base_sha256=hash_entries(base, entries),
        adapter_sha256=content_hash(adapter),
        limit=wanted,
        forced=force and found.relative > wanted,
    )
