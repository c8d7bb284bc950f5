"""PEFT's tensors, sorted into an adapter; whatever does not fit together is a fault."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loralab.adapters import convolutions
from loralab.adapters.adapter import Adapter, Kind, Layer
from loralab.adapters.peft_names import (
    APART,
    BASE,
    CLASSIFIER,
    EMBEDDINGS,
    FACTOR,
    GROUPED,
    INNER,
    MODEL_CLASS,
    PARTS,
    PEFT_APPLIES_OUT_PROJ,
    PREFIX,
    REPEATED,
    TOKENS,
    is_inner,
)
from loralab.adapters.settings import LoRAConfig

KINDS: dict[int, Kind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
LINEAR, EMBEDDING = Layer(), Layer(kind="embedding")


def assemble(
    config: LoRAConfig,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    faults: list[str],
) -> Adapter | None:
    """The adapter that the tensors are under these settings; None where there are faults."""
    before = len(faults)
    parts = _sort(tensors, faults)
    config = _with_named_rows(config, raw, parts.rows)
    for name in _table(metadata, REPEATED, faults):
        if name in parts.extra:
            parts.repeated[name] = parts.extra.pop(name)
    ours = _Ours(
        grouped=_table(metadata, GROUPED, faults),
        apart=_table(metadata, APART, faults),
        base=_table(metadata, BASE, faults),
    )
    _check_classifier(_table(metadata, CLASSIFIER, faults), faults)
    pairs = _pair_up(config, parts, ours, faults)
    whole = _whole_modules(config, parts.extra, faults)
    if len(faults) > before:
        return None
    facts = {}
    if isinstance(raw.get("base_model_name_or_path"), str):
        facts["base_model"] = raw["base_model_name_or_path"]
    if MODEL_CLASS in metadata:
        facts["model_class"] = metadata[MODEL_CLASS]
    if CLASSIFIER in metadata:
        facts["classifier"] = metadata[CLASSIFIER]
    if isinstance(raw.get("task_type"), str):
        facts["task_type"] = raw["task_type"]
    if raw.get("fan_in_fan_out"):
        facts["fan_in_fan_out"] = "true"
    return Adapter(
        config=_with_exceptions(config, pairs),
        pairs={name: (pair.A, pair.B) for name, pair in pairs.items()},
        extra=parts.extra,
        magnitudes={name: value.reshape(-1) for name, value in parts.magnitude.items()},
        token_rows={name: (_row_numbers(config, name), rows) for name, rows in parts.rows.items()},
        layers={name: pair.layer for name, pair in pairs.items()},
        whole_modules=whole,
        repeated=parts.repeated,
        base={name: str(value) for name, value in ours.base.items()} if BASE in metadata else None,
        facts=facts,
    )


@dataclass
class _Parts:
    """Tensors by the module they belong to, or by their full name."""

    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)
    magnitude: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    extra: dict[str, Tensor] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ours:
    """What our own entries in the metadata say of single modules."""

    grouped: Mapping[str, Any]
    apart: Mapping[str, Any]
    base: Mapping[str, Any]


@dataclass(frozen=True)
class _Pair:
    A: Tensor
    B: Tensor
    layer: Layer
    alpha: float | int
    exceptional: bool  # rank and alpha are not those that the file's settings give the module


def _sort(tensors: Mapping[str, Tensor], faults: list[str]) -> _Parts:
    parts = _Parts()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX) or "/" in key or "\\" in key or ".." in key:
            faults.append(f"tensor {key!r} is not named as PEFT names tensors")
            continue
        if not tensor.is_floating_point() and tensor.dtype not in (torch.int64, torch.int32):
            faults.append(f"tensor {key!r} is of type {tensor.dtype}")
            continue
        name = key[len(PREFIX) :]
        module, _, last = name.rpartition(FACTOR)
        known = PARTS.get(last)
        if INNER in name:
            if name.endswith(f"{INNER}weight"):
                parts.repeated[name.replace(INNER, ".")] = tensor
                continue
            name, module = name.replace(INNER, "."), module.replace(INNER, ".")
        if known is not None:
            part, is_embedding = known
            getattr(parts, part)[module] = tensor
            if is_embedding:
                parts.embeddings.add(module)
        elif name.endswith(TOKENS):
            parts.rows[name.removesuffix(TOKENS)] = tensor
        else:
            parts.extra[name] = tensor
    return parts


def _pair_up(config: LoRAConfig, parts: _Parts, ours: _Ours, faults: list[str]) -> dict[str, _Pair]:
    pairs: dict[str, _Pair] = {}
    faults.extend(f"{name}: its B is missing" for name in parts.A if name not in parts.B)
    faults.extend(f"{name}: its A is missing" for name in parts.B if name not in parts.A)
    for name, A in parts.A.items():
        if name not in parts.B:
            continue
        B = parts.B[name]
        inner = is_inner(name, parts.A)
        owner = name.removesuffix(".out_proj") if inner else name  # PEFT gives both its rank
        rank, alpha = config.rank_at(owner), config.alpha_at(owner)
        fault = _fault_of_pair(rank, A, B)
        if fault:
            faults.append(f"{name}: {fault}")
        elif A.ndim == 2:
            layer = EMBEDDING if name in parts.embeddings else LINEAR
            if name in ours.apart:
                layer = replace(layer, apart=str(ours.apart[name]))
            B = B * PEFT_APPLIES_OUT_PROJ if inner else B
            pairs[name] = _Pair(A, B, layer, alpha, inner)
        else:
            pairs[name] = _convolution(config, name, A, B, alpha, ours)
    if config.dora:
        faults.extend(f"{n}: its magnitude is missing" for n in pairs if n not in parts.magnitude)
    faults.extend(f"{n}: a magnitude without a pair" for n in parts.magnitude if n not in parts.A)
    if parts.magnitude and not config.dora:
        faults.append("there are DoRA magnitudes, but use_dora is off")
    return pairs


def _fault_of_pair(rank: int, A: Tensor, B: Tensor) -> str | None:
    if A.ndim < 2 or A.ndim != B.ndim or A.ndim > 5:
        return f"A is {tuple(A.shape)} and B {tuple(B.shape)}: no factor pair"
    if not A.is_floating_point() or not B.is_floating_point() or A.numel() * B.numel() == 0:
        return f"A is {A.dtype} {tuple(A.shape)} and B {B.dtype} {tuple(B.shape)}: no factor pair"
    if any(size != 1 for size in B.shape[2:]):
        return f"B is {tuple(B.shape)}, not a pointwise convolution"
    if A.shape[0] != B.shape[1] and not _is_grouped(A, B):
        return f"A is {tuple(A.shape)} and B {tuple(B.shape)}: their ranks do not multiply"
    if A.shape[0] != rank:
        return f"its tensors are of rank {A.shape[0]}, the config says {rank}"
    return None


def _is_grouped(A: Tensor, B: Tensor) -> bool:
    """Whether B maps each group's share of the rank to the group's share of the outputs."""
    groups, left = divmod(A.shape[0], B.shape[1])
    return A.ndim > 2 and left == 0 and B.shape[0] % groups == 0


def _convolution(
    config: LoRAConfig, name: str, A: Tensor, B: Tensor, alpha: float | int, ours: _Ours
) -> _Pair:
    groups = A.shape[0] // B.shape[1]
    layer = Layer(
        kind=KINDS[A.ndim],
        kernel=tuple(A.shape[2:]),
        base_groups=groups,
        apart=str(ours.apart.get(name, "")),
    )
    if groups == 1:
        return _Pair(A.flatten(1), B.flatten(1), layer, alpha, exceptional=False)
    own = None if A.is_meta else convolutions.from_peft(A, groups)
    if own is None:  # trained by PEFT: A sees the channels of all groups
        layer = replace(layer, groups=groups)
        return _Pair(A.flatten(1), B.flatten(1), layer, alpha, exceptional=False)
    told = ours.grouped.get(name)  # the exact alpha, where the file says it
    less = groups if config.scaling == "alpha/rank" else math.sqrt(groups)
    alpha = told if isinstance(told, float | int) else alpha / less
    return _Pair(own, B.flatten(1), layer, alpha, exceptional=True)


def _with_exceptions(config: LoRAConfig, pairs: Mapping[str, _Pair]) -> LoRAConfig:
    """The settings with the ranks and alphas of the modules that are read in another form."""
    found = {
        "^" + name.replace(".", r"\."): pair for name, pair in pairs.items() if pair.exceptional
    }
    if not found:
        return config
    ranks = {key: pair.A.shape[0] for key, pair in found.items()}
    alphas = {key: pair.alpha for key, pair in found.items()}
    return replace(
        config,
        rank_pattern=ranks | {k: v for k, v in config.rank_pattern.items() if k not in ranks},
        alpha_pattern=alphas | {k: v for k, v in config.alpha_pattern.items() if k not in alphas},
    )


def _whole_modules(
    config: LoRAConfig, extra: Mapping[str, Tensor], faults: list[str]
) -> tuple[str, ...]:
    """Full names of the modules that the other tensors belong to."""
    found: dict[str, None] = {}
    for name in extra:
        owner = _owner(name, (*config.whole_modules, *EMBEDDINGS))
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


def _check_classifier(told: Mapping[str, Any], faults: list[str]) -> None:
    labels, pooling = told.get("labels", []), told.get("pooling", "")
    names = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if not names or not isinstance(pooling, str):
        faults.append(f"{CLASSIFIER} in the metadata is not readable")


def _with_named_rows(
    config: LoRAConfig, raw: Mapping[str, Any], rows: Mapping[str, Tensor]
) -> LoRAConfig:
    """A plain list of rows means the input embedding, whose name the tensors alone tell."""
    if isinstance(raw.get("trainable_token_indices"), dict) or len(config.token_rows) != len(rows):
        return config
    listed = tuple(config.token_rows.values())
    return replace(config, token_rows=dict(zip(rows, listed, strict=True)))


def _row_numbers(config: LoRAConfig, module: str) -> Tensor:
    for suffix, indices in config.token_rows.items():
        if module == suffix or module.endswith("." + suffix):
            return torch.tensor(indices, dtype=torch.int64)
    return torch.empty(0, dtype=torch.int64)


def _table(metadata: Mapping[str, str], key: str, faults: list[str]) -> dict[str, Any]:
    """One of our entries in the metadata, a JSON table; empty where it is missing."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        faults.append(f"{key} in the metadata is not readable")
        return {}
    return found
