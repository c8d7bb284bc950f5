"""PEFT's folder, `adapter_config.json` and `adapter_model.safetensors`, both ways.

A folder is read as a whole before anything is made of it: every fault goes into one error.
"""

import hashlib
import json
import zlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loralab.adapters import peft_config
from loralab.adapters.adapter import Adapter, Kind, Layer
from loralab.adapters.probes import read_probes, write_probes
from loralab.adapters.settings import LoRAConfig
from loralab.errors import AdapterError
from loralab.files import replacing, write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CONTENT, BASE, CHECKSUM, MODEL_CLASS = (
    "loralab.content",
    "loralab.base",
    "loralab.checksum",
    "loralab.model_class",
)
FACTORS = {  # ending of a key -> (which factor, of what)
    ".lora_A.weight": ("A", "layer"),
    ".lora_B.weight": ("B", "layer"),
    ".lora_embedding_A": ("A", "embedding"),
    ".lora_embedding_B": ("B", "embedding"),
    ".lora_magnitude_vector": ("magnitude", "layer"),
    ".lora_magnitude_vector.weight": ("magnitude", "layer"),
}
TOKENS = ".token_adapter.trainable_tokens_delta"
# PEFT 0.21 adds the delta of an attention's output projection twice: its `merge` writes the merged
# weight and then merges the inner layer once more. So B is halved and doubled on the way.
PEFT_APPLIES_OUT_PROJ = 2
MAX_HEADER_BYTES = 100_000_000


def write_adapter(adapter: Adapter, path: str | Path) -> None:
    """Writes PEFT's two files, and the probes if it has any; other files in the folder stay.

    Raises `OutputError`.
    """
    folder = Path(path)
    tensors = to_tensors(adapter)
    config = peft_config.to_peft(adapter)
    content = content_hash(adapter)
    metadata = {CONTENT: content}
    if adapter.base is not None:
        metadata[BASE] = json.dumps(dict(adapter.base), separators=(",", ":"))
    if "model_class" in adapter.facts:
        metadata[MODEL_CLASS] = adapter.facts["model_class"]
    metadata["format"] = "pt"
    data = safetensors.torch.save(tensors, metadata)
    metadata[CHECKSUM] = _checksum(data, config)
    data = safetensors.torch.save(tensors, metadata)
    if folder.is_dir():
        _write_files(folder, data, config)
        write_probes(folder, adapter.probes, content)
        return
    with replacing(folder) as aside:
        aside.mkdir()
        _write_files(aside, data, config)
        write_probes(aside, adapter.probes, content)


def _write_files(folder: Path, data: bytes, config: Mapping[str, Any]) -> None:
    with replacing(folder / WEIGHTS_FILE) as aside:
        aside.write_bytes(data)
    write_json(folder / CONFIG_FILE, config)


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names and in PEFT's shapes."""
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in adapter.pairs.items():
        layer = adapter.layer(path)
        name = _peft_name(adapter, path)
        if _is_inner(path, adapter.pairs):
            owner = path.removesuffix(".out_proj")  # PEFT gives both the owner's scale
            B = B * (adapter.scale(path) / adapter.scale(owner) / PEFT_APPLIES_OUT_PROJ)
        if layer.kind == "embedding":
            tensors[f"{name}.lora_embedding_A"] = A
            tensors[f"{name}.lora_embedding_B"] = B
            continue
        if layer.kernel:
            A = A.view(A.shape[0], -1, *layer.kernel)
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
        inner = f"{_peft_name(adapter, module)}.base_layer.{last}"
        tensors[inner if module in adapter.pairs else name] = tensor
    return {PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _peft_name(adapter: Adapter, path: str) -> str:
    """PEFT's name of a module: an attention's output projection lies inside what it wraps."""
    if not _is_inner(path, adapter.pairs):
        return path
    return f"{path.removesuffix('.out_proj')}.base_layer.out_proj"


def _is_inner(path: str, paths: Container[str]) -> bool:
    """Whether the module is the output projection of an attention that has a pair itself."""
    return path.endswith(".out_proj") and path.removesuffix(".out_proj") in paths


def read_adapter(path: str | Path) -> Adapter:
    """A PEFT folder as a value. Raises `AdapterError` that lists everything that is wrong."""
    folder = Path(path)
    faults: list[str] = []
    raw = _read_config(folder / CONFIG_FILE, faults)
    data = _read_weights(folder, faults)
    tensors, metadata = _parse(data, faults) if data is not None else (None, {})
    config = peft_config.from_peft(raw, faults) if raw is not None else None
    adapter = None
    if config is not None and tensors is not None:
        adapter = _assemble(config, raw, tensors, metadata, faults)
    ours = any(key.startswith("loralab.") for key in metadata)
    if not faults and data is not None and ours and metadata.get(CHECKSUM) != _checksum(data, raw):
        faults.append(f"the files differ from what was saved ({CHECKSUM} does not match)")
    probes = read_probes(folder, metadata.get(CONTENT), faults)
    if faults or adapter is None:
        raise AdapterError(
            "\n  - ".join([f"{folder} is no usable adapter", *faults]),
            "fetch or save the adapter again; nothing was loaded.",
        )
    return replace(adapter, probes=probes)


def content_hash(adapter: Adapter) -> str:
    """SHA-256 of what the adapter does: tensors, scales and settings, whatever file holds them."""
    digest = hashlib.sha256()
    tensors = to_tensors(adapter)
    for name in sorted(tensors):
        value = tensors[name].cpu()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(_bytes(value))
    for name in sorted(adapter.pairs):
        digest.update(f"{name}|{adapter.scale(name)!r}|{adapter.layer(name)}|".encode())
    for name, (indices, _) in sorted(adapter.token_rows.items()):
        digest.update(f"{name}|{indices.tolist()}|".encode())
    return digest.hexdigest()


def _checksum(data: bytes, config: Any) -> str:
    """CRC-32 over the tensors as they lie in the file, its header and the settings.

    It finds damage; who an adapter is says `content_hash`.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].pop(CHECKSUM, None)
    said = json.dumps([header, config], sort_keys=True)
    return f"{zlib.crc32(memoryview(data)[8 + length :], zlib.crc32(said.encode())):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_config(file: Path, faults: list[str]) -> Any:
    if not file.is_file():
        faults.append(f"{file.name} is missing")
        return None
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        faults.append(f"{file.name} is not readable: {error}")
        return None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names that stand twice: {', '.join(twice)}")
    return table


def _read_weights(folder: Path, faults: list[str]) -> bytes | None:
    file = folder / WEIGHTS_FILE
    if file.is_file():
        return file.read_bytes()
    faults.append(f"{file.name} is missing")
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        faults.append(
            f"{pickles[0]} is a pickle, which can run code when it is read; convert it where"
            ' you trust it: python -c "import torch, safetensors.torch as s;'
            f" s.save_file(torch.load('{pickles[0]}', weights_only=True), '{WEIGHTS_FILE}')\""
        )
    return None


def _parse(data: bytes, faults: list[str]) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    try:
        return safetensors.torch.load(data), _read_header(data)
    except (ValueError, RecursionError, KeyError, TypeError, SafetensorError) as error:
        faults.append(f"{WEIGHTS_FILE} is damaged: {error}")
        return None, {}


def _read_header(data: bytes) -> dict[str, str]:
    """The metadata; raises `ValueError` for what the safetensors library lets pass."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header says {length} bytes, the file has {len(data)}")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_repeats)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def _assemble(
    config: LoRAConfig,
    raw: Any,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    faults: list[str],
) -> Adapter | None:
    """Sorts the tensors by what they are; whatever does not fit together is a fault."""
    before = len(faults)
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "magnitude": {}}
    embeddings: set[str] = set()
    extra: dict[str, Tensor] = {}
    repeated: dict[str, Tensor] = {}
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or "/" in key or "\\" in key or ".." in key:
            faults.append(f"tensor {key!r} is not named as PEFT names tensors")
            continue
        if not tensor.is_floating_point() and tensor.dtype not in (torch.int64, torch.int32):
            faults.append(f"tensor {key!r} is of type {tensor.dtype}")
            continue
        ending = next((end for end in FACTORS if name.endswith(end)), None)
        if ending is not None:
            part, of = FACTORS[ending]
            module = name.removesuffix(ending).replace(".base_layer.", ".")
            parts[part][module] = tensor
            if of == "embedding":
                embeddings.add(module)
        elif name.endswith(TOKENS):
            module = name.removesuffix(TOKENS)
            rows[module] = (_row_numbers(config, module), tensor)
        elif name.endswith(".base_layer.weight"):
            repeated[name.replace(".base_layer.", ".")] = tensor
        else:
            extra[name.replace(".base_layer.", ".")] = tensor
    _check_finite(tensors, faults)
    pairs, kinds = _pair_up(config, parts, embeddings, faults)
    whole = _whole_modules(config, extra, faults)
    if len(faults) > before:
        return None
    facts = {}
    if isinstance(raw.get("base_model_name_or_path"), str):
        facts["base_model"] = raw["base_model_name_or_path"]
    if MODEL_CLASS in metadata:
        facts["model_class"] = metadata[MODEL_CLASS]
    if raw.get("fan_in_fan_out"):
        facts["fan_in_fan_out"] = "true"
    return Adapter(
        config=config,
        pairs=pairs,
        extra=extra,
        magnitudes={name: value.reshape(-1) for name, value in parts["magnitude"].items()},
        token_rows=rows,
        layers=kinds,
        whole_modules=whole,
        repeated=repeated,
        base=_base(metadata, faults),
        facts=facts,
    )


def _pair_up(
    config: LoRAConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    embeddings: set[str],
    faults: list[str],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Layer]]:
    As, Bs, magnitudes = parts["A"], parts["B"], parts["magnitude"]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    kinds: dict[str, Layer] = {}
    faults.extend(f"{name}: its B is missing" for name in As if name not in Bs)
    faults.extend(f"{name}: its A is missing" for name in Bs if name not in As)
    for name in As.keys() & Bs.keys():
        fault = _fault_of_pair(config, name, As[name], Bs[name])
        if fault:
            faults.append(f"{name}: {fault}")
            continue
        A, B = As[name], Bs[name]
        if _is_inner(name, As):
            B = B * PEFT_APPLIES_OUT_PROJ
        pairs[name] = (A.flatten(1), B.flatten(1))
        kinds[name] = _layer(A, name in embeddings)
    if config.dora:
        faults.extend(f"{n}: its magnitude is missing" for n in pairs if n not in magnitudes)
    faults.extend(f"{n}: a magnitude without a pair" for n in magnitudes if n not in As)
    if magnitudes and not config.dora:
        faults.append("there are DoRA magnitudes, but use_dora is off")
    return {name: pairs[name] for name in As if name in pairs}, kinds


def _fault_of_pair(config: LoRAConfig, name: str, A: Tensor, B: Tensor) -> str | None:
    if A.ndim < 2 or A.ndim != B.ndim or A.ndim > 5:
        return f"A is {tuple(A.shape)} and B {tuple(B.shape)}: no factor pair"
    if not A.is_floating_point() or not B.is_floating_point() or A.numel() * B.numel() == 0:
        return f"A is {A.dtype} {tuple(A.shape)} and B {B.dtype} {tuple(B.shape)}: no factor pair"
    if any(size != 1 for size in B.shape[2:]):
        return f"B is {tuple(B.shape)}, not a pointwise convolution"
    if A.shape[0] != B.shape[1]:
        return f"A is {tuple(A.shape)} and B {tuple(B.shape)}: their ranks do not multiply"
    rank = config.rank_at(name)
    if A.shape[0] != rank:
        return f"its tensors are of rank {A.shape[0]}, the config says {rank}"
    return None


def _layer(A: Tensor, is_embedding: bool) -> Layer:
    if is_embedding:
        return Layer(kind="embedding")
    kinds: dict[int, Kind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
    return Layer(kind=kinds[A.ndim], kernel=tuple(A.shape[2:]))


def _whole_modules(
    config: LoRAConfig, extra: Mapping[str, Tensor], faults: list[str]
) -> tuple[str, ...]:
    """Full names of the modules that the other tensors belong to."""
    found: dict[str, None] = {}
    for name in extra:
        owner = _owner(name, config.whole_modules)
        if owner is not None:
            found[owner] = None
        elif not (config.biases != "none" and name.rpartition(".")[2] == "bias"):
            faults.append(f"tensor {name!r} belongs to nothing that the config names")
    return tuple(found)


def _owner(tensor: str, suffixes: Iterable[str]) -> str | None:
    """The module that the tensor is of; PEFT's suffixes need not start at a dot."""
    parts = tensor.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if any(path.endswith(suffix) for suffix in suffixes):
            return path
    return None


def _row_numbers(config: LoRAConfig, module: str) -> Tensor:
    for suffix, indices in config.token_rows.items():
        if module == suffix or module.endswith("." + suffix):
            return torch.tensor(indices, dtype=torch.int64)
    return torch.empty(0, dtype=torch.int64)


def _check_finite(tensors: Mapping[str, Tensor], faults: list[str]) -> None:
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    sums = [value.sum(dtype=torch.float32) for value in floating.values()]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return
    # a sum may also overflow, so only the values themselves decide
    bad = [name for name, value in floating.items() if not bool(value.isfinite().all())]
    faults.extend(f"tensor {name!r} holds NaN or Inf" for name in bad)


def _base(metadata: Mapping[str, str], faults: list[str]) -> dict[str, str] | None:
    if BASE not in metadata:
        return None
    try:
        found = json.loads(metadata[BASE])
        return {str(name): str(value) for name, value in found.items()}
    except (ValueError, AttributeError):
        faults.append(f"{BASE} is not readable")
        return None
