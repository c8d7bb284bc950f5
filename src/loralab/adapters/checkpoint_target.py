"""What a merged checkpoint is where it is more than the base's files with other bytes.

A tied weight that the adapter changes on one side only, and a head that the base has not, become
tensors of a file of their own, and the settings say so.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.checkpoint_files import DTYPES, Entry, copy_bytes
from loralab.adapters.layers import path_of
from loralab.adapters.merging import weight_name
from loralab.adapters.mixing import some
from loralab.adapters.targets import HEAD_NAMES
from loralab.adapters.tying import FLAG, can_be_declared_untied
from loralab.errors import ModelError
from loralab.files import write_json

INDEX_FILE = "model.safetensors.index.json"
ADDED_FILE = "model-added.safetensors"
ONE_FILE = "model.safetensors"  # read before any index, so it cannot stand beside another file
BASE_FILE = "model-base.safetensors"

Source = Entry | Tensor  # what an added tensor starts as: the base's bytes, or the adapter's tensor


@dataclass(frozen=True, eq=False)
class Target:
    """The merged checkpoint, before anything is written.

    model: its modules, without weights. entries: where each tensor will be. added: what those in
    `ADDED_FILE` start as. settings: what changes in `config.json`. rows: name of a table whose rows
    the adapter replaces -> names of all tables that are to get them.
    """

    model: nn.Module
    entries: dict[str, Entry]
    added: dict[str, Source] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)
    header: bytes = b""

    @property
    def renamed(self) -> dict[str, str]:
        """Files of the base that get another name."""
        return {ONE_FILE: BASE_FILE} if self.added else {}


def target_of(
    base: Path, adapter: Adapter, entries: Mapping[str, Entry], faults: list[str]
) -> Target:
    """The checkpoint that merging makes; what cannot be expressed is added to `faults` by name.

    Raises `ModelError` for a folder whose config names no model.
    """
    settings: dict[str, Any] = {}
    config, kind = _config_of(base)
    heads = [name for name in adapter.extra if name not in entries]
    model = _skeleton(base, config, kind)
    lacking = [name for name in heads if name not in _tensors(model)]
    wanted = adapter.facts.get("model_class", kind)
    if lacking and wanted != kind:
        labels = _num_labels(adapter, lacking)
        settings |= {"architectures": [wanted], **_labels(labels, adapter.label_names)}
        if labels:
            config.num_labels = labels
        model = _skeleton(base, config, wanted)
    added: dict[str, Source] = {}
    rows = _untie(model, adapter, entries, added, settings)
    _add_heads(model, adapter, heads, entries, added, faults)
    if "architectures" in settings:
        _check_complete(model, entries, added, faults)
    header, places = _layout(added, entries)
    here = {
        name: replace(e, file=BASE_FILE if added and e.file == ONE_FILE else e.file)
        for name, e in entries.items()
    }
    return Target(model, here | places, added, settings, rows, header)


def write_target(folder: Path, base: Path, target: Target) -> None:
    """Writes the added tensors, the index and the settings into the copy of the base's folder."""
    if target.added:
        with (folder / ADDED_FILE).open("wb") as handle:
            handle.write(target.header)
            for name, source in target.added.items():
                if isinstance(source, Entry):
                    copy_bytes(base, source, handle)
                else:
                    dtype = DTYPES[target.entries[name].dtype]
                    values = source.detach().to(dtype).contiguous().reshape(-1)
                    handle.write(values.view(torch.uint8).numpy().data)
        _write_index(folder, target.entries)
    if target.settings:
        raw = json.loads((folder / "config.json").read_bytes())
        write_json(folder / "config.json", raw | target.settings)


def _write_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    file = folder / INDEX_FILE
    told = json.loads(file.read_bytes()) if file.is_file() else {}
    size = sum(entry.stop - entry.start for entry in entries.values())
    told["metadata"] = {**told.get("metadata", {}), "total_size": size}
    told["weight_map"] = {name: entries[name].file for name in sorted(entries)}
    write_json(file, told)


def _config_of(base: Path) -> tuple[Any, str]:
    from transformers import AutoConfig  # slow to import

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise _unbuildable(base, error) from None
    return config, (config.architectures or ["AutoModel"])[0]


def _skeleton(base: Path, config: Any, kind: str) -> nn.Module:
    """The model of that class on the meta device: modules without weights."""
    import transformers

    try:
        with torch.device("meta"):
            return getattr(transformers, kind)(config)
    except (OSError, ValueError, AttributeError) as error:
        raise _unbuildable(base, error) from None


def _unbuildable(base: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{base}: its config.json names no model that can be built ({error})",
        "give a transformers folder.",
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; of a module under two names, under the first."""
    return {
        f"{path}.{key}" if path else key: tensor
        for path, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _num_labels(adapter: Adapter, heads: list[str]) -> int | None:
    """The outputs of the head that the adapter brings."""
    return next(
        (
            adapter.extra[name].shape[0]
            for name in heads
            if HEAD_NAMES & set(name.split(".")) and name.endswith("weight")
        ),
        None,
    )


def _labels(number: int | None, names: Sequence[str]) -> dict[str, Any]:
    if number is None:
        return {}
    if len(names) != number:
        names = [f"LABEL_{index}" for index in range(number)]
    return {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _changed_by_pairs(model: nn.Module, adapter: Adapter) -> set[str]:
    modules = dict(model.named_modules())
    return {
        f"{path}.{weight_name(modules[path])}"
        for path in adapter.pairs
        if path in modules and path_of(modules[path]) is not None
    }


def _untie(
    model: nn.Module,
    adapter: Adapter,
    entries: Mapping[str, Entry],
    added: dict[str, Source],
    settings: dict[str, Any],
) -> dict[str, list[str]]:
    """Gives tied weights of which the adapter changes a side tensors of their own.

    Returns the tables that get the adapter's token rows: those tied to a table get them, too.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in _tensors(model).items():
        groups.setdefault(id(tensor), []).append(name)
    changed = _changed_by_pairs(model, adapter) | set(adapter.extra)
    cut = [names for names in groups.values() if len(names) > 1 and changed.intersection(names)]
    for names in cut:
        stored = next((entries[name] for name in names if name in entries), None)
        if stored is not None:
            added.update({name: stored for name in names if name not in entries})
    if cut and can_be_declared_untied(model):
        settings[FLAG] = False
    tables = {f"{path}.weight" for path in adapter.token_rows}
    return {
        table: [name for name in names if name in entries or name in added]
        for names in groups.values()
        for table in tables.intersection(names)
    }


def _add_heads(
    model: nn.Module,
    adapter: Adapter,
    heads: list[str],
    entries: Mapping[str, Entry],
    added: dict[str, Source],
    faults: list[str],
) -> None:
    own = _tensors(model)
    for name in heads:
        if name in added:
            continue  # a side of a tie
        tensor = adapter.extra[name]
        if name not in own:
            faults.append(f"{name}: the adapter's own tensor, of which the checkpoint has none")
        elif own[name].shape != tensor.shape:
            shape = tuple(own[name].shape)
            faults.append(f"{name}: {tuple(tensor.shape)}, in the model {shape}")
        else:
            added[name] = tensor


def _check_complete(
    model: nn.Module,
    entries: Mapping[str, Entry],
    added: Mapping[str, Source],
    faults: list[str],
) -> None:
    """A checkpoint of another class must hold all of its weights."""
    known = {
        id(t)
        for name, t in model.named_parameters(remove_duplicate=False)
        if name in entries or name in added
    }
    missing = [name for name, tensor in model.named_parameters() if id(tensor) not in known]
    if missing:
        faults.append(
            f"{some(missing)}: neither the checkpoint nor the adapter holds it, so that a"
            f" {type(model).__name__} would start with random values there"
        )


def _layout(
    added: Mapping[str, Source], entries: Mapping[str, Entry]
) -> tuple[bytes, dict[str, Entry]]:
    """The header of the file of added tensors, and where in it each is."""
    usual = Counter(entry.dtype for entry in entries.values()).most_common(1)[0][0]
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, spans = 0, {}
    for name, source in added.items():
        kind = source.dtype if isinstance(source, Entry) else usual
        if isinstance(source, Tensor) and not source.is_floating_point():
            kind = "I64"
        shape = tuple(source.shape)
        start, end = end, end + DTYPES[kind].itemsize * torch.Size(shape).numel()
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        spans[name] = start, end, kind, shape
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {
        name: Entry(ADDED_FILE, len(header) + start, len(header) + stop, kind, shape)
        for name, (start, stop, kind, shape) in spans.items()
    }
    return header, places
