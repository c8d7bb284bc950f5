"""PEFT's folder, `adapter_config.json` and `adapter_model.safetensors`, both ways.

A folder is read as a whole before anything is made of it: every fault goes into one error.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters import convolutions, peft_config, weights_file
from loralab.adapters.adapter import Adapter
from loralab.adapters.peft_limits import beyond_peft
from loralab.adapters.peft_names import (
    APART,
    BASE,
    CLASSIFIER,
    CONFIG_CHECKSUM,
    CONFIG_FILE,
    CONTENT,
    GROUPED,
    INNER,
    MODEL_CLASS,
    PEFT_APPLIES_OUT_PROJ,
    PREFIX,
    REPEATED,
    TOKENS,
    WEIGHTS_FILE,
    is_inner,
    peft_name,
)
from loralab.adapters.peft_reading import assemble
from loralab.adapters.probes import read_probes, write_probes
from loralab.adapters.weights_file import WeightsFile, unrepeated
from loralab.errors import AdapterError
from loralab.files import replacing, write_json


def write_adapter(adapter: Adapter, path: str | Path, *, portable: bool = True) -> None:
    """Writes PEFT's two files, and the probes if it has any; other files in the folder stay.

    portable: PEFT applies the adapter exactly as loralab does. Where it would not, `AdapterError`
    names every such module; with `portable=False` the folder is for loralab alone, and PEFT refuses
    it. Raises `OutputError` for the disk.
    """
    faults = beyond_peft(adapter)
    if faults and portable:
        raise AdapterError(
            "\n  - ".join(["PEFT would apply this adapter otherwise, or not at all", *faults]),
            "leave these modules out (`exclude`), or save with portable=False for loralab alone.",
        )
    folder = Path(path)
    config = peft_config.to_peft(adapter, portable=not faults)
    content = content_hash(adapter)
    data = weights_file.encode(to_tensors(adapter), _metadata(adapter, config, content))
    if folder.is_dir():
        _write_files(folder, data, config)
        write_probes(folder, adapter.probes, content)
        return
    with replacing(folder) as aside:
        aside.mkdir()
        _write_files(aside, data, config)
        write_probes(aside, adapter.probes, content)


def _metadata(adapter: Adapter, config: Mapping[str, Any], content: str) -> dict[str, str]:
    layers = {path: adapter.layer(path) for path in adapter.pairs}
    grouped = {
        path: adapter.config.alpha_at(path)
        for path, layer in layers.items()
        if layer.base_groups > layer.groups
    }
    apart = {path: layer.apart for path, layer in layers.items() if layer.apart}
    repeated = dict.fromkeys(_bystanders(adapter), True)
    metadata = {"format": "pt", CONTENT: content, CONFIG_CHECKSUM: _config_checksum(config)}
    tables = ((BASE, adapter.base), (GROUPED, grouped), (APART, apart), (REPEATED, repeated))
    for key, table in tables:
        if table or (key == BASE and table is not None):
            metadata[key] = json.dumps(dict(table), separators=(",", ":"))
    for key, fact in ((MODEL_CLASS, "model_class"), (CLASSIFIER, "classifier")):
        if fact in adapter.facts:
            metadata[key] = adapter.facts[fact]
    return metadata


def _write_files(folder: Path, data: bytes, config: Mapping[str, Any]) -> None:
    with replacing(folder / WEIGHTS_FILE) as aside:
        aside.write_bytes(data)
    write_json(folder / CONFIG_FILE, config)


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names and in PEFT's shapes."""
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in adapter.pairs.items():
        layer = adapter.layer(path)
        name = peft_name(path, adapter.pairs)
        if is_inner(path, adapter.pairs):
            owner = path.removesuffix(".out_proj")  # PEFT gives both the owner's scale
            B = B * (adapter.scale(path) / adapter.scale(owner) / PEFT_APPLIES_OUT_PROJ)
        if layer.kind == "embedding":
            tensors[f"{name}.lora_embedding_A"] = A
            tensors[f"{name}.lora_embedding_B"] = B
            continue
        if layer.kernel:
            A = convolutions.to_peft(A, layer)
            B = B.view(*B.shape, *(1 for _ in layer.kernel))
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
    for name, magnitude in adapter.magnitudes.items():
        kernel = adapter.layer(name).kernel
        if kernel:
            magnitude = magnitude.view(1, -1, *(1 for _ in kernel))
        tensors[f"{name}.lora_magnitude_vector"] = magnitude
    for name, (_, rows) in adapter.token_rows.items():
        tensors[name + TOKENS] = rows
    for name, tensor in adapter.extra.items():
        module, _, last = name.rpartition(".")
        inner = f"{peft_name(module, adapter.pairs)}{INNER}{last}"
        tensors[inner if module in adapter.pairs else name] = tensor
    tensors |= _bystanders(adapter)
    return {PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _bystanders(adapter: Adapter) -> dict[str, Tensor]:
    """The repeated tensors that PEFT asks for; it does not ask for a targeted embedding's."""
    repeated = adapter.repeated.items()
    return {
        name: tensor for name, tensor in repeated if name.rpartition(".")[0] not in adapter.pairs
    }


def read_adapter(path: str | Path, *, proved_later: bool = False) -> Adapter:
    """A PEFT folder as a value. Raises `AdapterError` that lists everything that is wrong.

    proved_later: settings that differ from those that the tensors were saved with, and probes of
        another content, are no faults: `facts["changed"]` names them, and whoever asks must hold
        the adapter against its probes.
    """
    return read_folder(Path(path), proved_later=proved_later)[0]


def read_folder(folder: Path, *, proved_later: bool = False) -> tuple[Adapter, WeightsFile]:
    """`read_adapter`, and the file that its tensors are views of."""
    faults: list[str] = []
    raw = _read_config(folder / CONFIG_FILE, faults)
    weights = _read_weights(folder, faults)
    config = peft_config.from_peft(raw, faults) if raw is not None else None
    adapter, probes = None, ()
    if config is not None and weights is not None:
        adapter = assemble(config, raw or {}, weights.tensors, weights.metadata, faults)
    if weights is not None:
        faults.extend(f"tensor {name!r} holds NaN or Inf" for name in weights.not_finite())
    changed: list[str] = []
    if not faults and weights is not None:
        _check_unchanged(weights, raw, faults, changed)
        probes = read_probes(folder, weights.metadata.get(CONTENT), faults, of_any=proved_later)
        if not proved_later:
            faults += changed
    if faults or adapter is None or weights is None:
        raise AdapterError(
            "\n  - ".join([f"{folder} is no usable adapter", *faults]),
            "fetch or save the adapter again; nothing was loaded.",
        )
    facts = {**adapter.facts, "changed": changed[0]} if changed else adapter.facts
    return replace(adapter, probes=probes, facts=facts), weights


def outline_adapter(path: str | Path) -> Adapter:
    """What `read_adapter` would give, with tensors on the device "meta": none of them is read.

    Settings, names, dtypes and shapes are checked as `read_adapter` checks them, values and
    checksums are not. Raises `AdapterError` that lists everything that is wrong.
    """
    folder = Path(path)
    faults: list[str] = []
    raw = _read_config(folder / CONFIG_FILE, faults)
    config = peft_config.from_peft(raw, faults) if raw is not None else None
    adapter = None
    try:
        spans, metadata = weights_file.read_header(folder / WEIGHTS_FILE)
    except ValueError as error:
        faults.append(f"{WEIGHTS_FILE} is damaged: {error}")
    except OSError:
        _read_weights(folder, faults)  # says what lies there instead
    else:
        tensors = {
            name: torch.empty(span.shape, dtype=weights_file.DTYPES[span.dtype], device="meta")
            for name, span in spans.items()
        }
        if config is not None:
            adapter = assemble(config, raw or {}, tensors, metadata, faults)
    if faults or adapter is None:
        raise AdapterError(
            "\n  - ".join([f"{folder} is no usable adapter", *faults]),
            "fetch or save the adapter again; nothing was loaded.",
        )
    return adapter


def content_hash(adapter: Adapter) -> str:
    """SHA-256 of what the adapter does: tensors, scales and settings, whatever file holds them."""
    digest = hashlib.sha256()
    tensors = to_tensors(adapter)
    for name in sorted(tensors):
        value = tensors[name].cpu()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(_bytes(value))
    for name in sorted(adapter.pairs):
        inner = is_inner(name, adapter.pairs)  # its tensors are those of its attention's scale
        scale = adapter.scale(name.removesuffix(".out_proj") if inner else name)
        digest.update(f"{name}|{scale!r}|".encode())
    for name, (indices, _) in sorted(adapter.token_rows.items()):
        digest.update(f"{name}|{indices.tolist()}|".encode())
    return digest.hexdigest()


def _check_unchanged(weights: WeightsFile, raw: Any, faults: list[str], changed: list[str]) -> None:
    """Finds damage by checksums, where the files are ours; who an adapter is says its hash.

    Tensors that differ are faults; settings that do are `changed`.
    """
    metadata = weights.metadata
    if not any(key.startswith("loralab.") for key in metadata):
        return
    if not weights.is_intact():
        faults.append(f"{WEIGHTS_FILE} differs from what was saved (its checksum is another)")
    elif metadata.get(CONFIG_CHECKSUM) != _config_checksum(raw):
        changed.append(f"{CONFIG_FILE} differs from what was saved with {WEIGHTS_FILE}")


def _config_checksum(config: Any) -> str:
    """CRC-32 of what the settings say, however they are laid out."""
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_config(file: Path, faults: list[str]) -> Any:
    if not file.is_file():
        faults.append(f"{file.name} is missing")
        return None
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=unrepeated)
    except (ValueError, RecursionError, OSError) as error:
        faults.append(f"{file.name} is not readable: {error}")
        return None


def _read_weights(folder: Path, faults: list[str]) -> WeightsFile | None:
    file = folder / WEIGHTS_FILE
    if file.is_file():
        try:
            return weights_file.read(file)
        except ValueError as error:
            faults.append(f"{WEIGHTS_FILE} is damaged: {error}")
        except OSError as error:
            faults.append(f"{WEIGHTS_FILE} cannot be read: {error.strerror}")
        return None
    faults.append(f"{file.name} is missing")
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        faults.append(
            f"{pickles[0]} is a pickle, which can run code when it is read; convert it where"
            ' you trust it: python -c "import torch, safetensors.torch as s;'
            f" s.save_file(torch.load('{pickles[0]}', weights_only=True), '{WEIGHTS_FILE}')\""
        )
    return None
