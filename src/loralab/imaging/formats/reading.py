"""LoRA files of the image world, read for a model; whatever does not fit is named."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import Adapter, Layer, LoRAConfig, misfits, read_adapter, walk
from loralab.adapters.layers import layer_of
from loralab.adapters.peft_names import CONFIG_FILE
from loralab.adapters.weights_file import read
from loralab.errors import AdapterError, ConfigError
from loralab.imaging.formats.keys import KOHYA, Key, Part, parse
from loralab.imaging.formats.layouts import Piece
from loralab.imaging.formats.names import Component, components_of, listed

log = logging.getLogger("loralab")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
METADATA = "lora_adapter_metadata"


def read_image_adapter(path: str | Path, model: nn.Module) -> Adapter:
    """The adapter in a LoRA file of kohya-ss, diffusers or PEFT, in the names of `model`.

    model: a denoiser (a UNet, an SD3 or Flux transformer), a text encoder, or a module with
        children called `unet`, `transformer`, `text_encoder`, `text_encoder_2`, `text_encoder_3`.
        Names are matched with the model's own, and with those of the original releases: where one
        original layer is several of the model (fused q, k, v), its up rows are split and its down
        is shared, which is exact.

    The scale of each layer is alpha / rank. Without any alpha it is 1, as everywhere.
    A folder with `adapter_config.json` is read as PEFT's. Nothing in a file is dropped: raises
    `AdapterError` that lists all keys that are unknown, layers the model lacks or has in another
    shape, half pairs, missing alphas, mixed conventions; and for pickles, which run code.
    """
    path = Path(path)
    _check_kind(path)
    if path.is_dir():
        adapter = read_adapter(path)
        _refuse(path, misfits(adapter, dict(walk(model))))
        return adapter
    try:
        weights = read(path)
    except (ValueError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}", "copy or download the file again."
        ) from None
    faults = [f"{name} holds NaN or Inf" for name in weights.not_finite()]
    entries = _sort(weights.tensors, components_of(model), faults)
    _add_alphas(entries, weights.metadata, faults)
    pairs: dict[str, _Layer] = {}
    for name, entry in entries.items():
        for layer in _layers(name, entry, faults):
            if layer.name in pairs:
                faults.append(f"{name}: another key of the file is {layer.name} too")
            pairs[layer.name] = layer
    if not entries and not faults:
        faults.append("it holds no pair of a LoRA")
    _refuse(path, faults)
    return _adapter(pairs)


@dataclass
class _Entry:
    """What the file holds under one name; piece: the model's modules that it is."""

    component: Component
    pieces: tuple[Piece, ...]
    tensors: dict[Part, Tensor] = field(default_factory=dict)
    alpha: float | None = None


@dataclass(frozen=True)
class _Layer:
    name: str
    A: Tensor
    B: Tensor
    alpha: float
    layer: Layer


def _check_kind(path: Path) -> None:
    if path.suffix in PICKLES:
        raise AdapterError(
            f"{path} is a pickle, which may run any code when it is opened",
            "get the .safetensors file of the same adapter, or have its author convert it.",
        )
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{path} is a folder without {CONFIG_FILE}", "name the .safetensors file itself."
        )
    if not path.exists():
        raise AdapterError(f"{path} does not exist", "check the path.")


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        raise AdapterError(
            f"{path} does not fit the model: {listed(faults)}",
            "take the adapter of this base (or the base of this adapter); "
            "a damaged file must be saved again.",
        )


def _sort(
    tensors: Mapping[str, Tensor], components: Mapping[str, Component], faults: list[str]
) -> dict[str, _Entry]:
    """The file's tensors by the name that they stand under."""
    entries: dict[tuple[tuple[str, ...], str], _Entry] = {}
    families: dict[str, str] = {}
    missing: dict[str, None] = {}
    for name, tensor in tensors.items():
        key = parse(name)
        if key is None:
            faults.append(f"{name}: no key of a LoRA file that is known here")
            continue
        if key.family:
            families.setdefault(key.family, name)
        stem = key.components, key.name
        if stem not in entries:
            found = _find(key, components)
            if isinstance(found, str):
                missing[found] = None
                continue
            entries[stem] = _Entry(*found)
        entry = entries[stem]
        if key.part in entry.tensors:
            faults.append(f"{name}: the file has this tensor under two keys")
        if not tensor.is_floating_point() and key.part != "alpha":
            faults.append(f"{name}: its type is {tensor.dtype}")
        entry.tensors[key.part] = tensor
    if len(families) > 1:
        said = ", ".join(f"{family} ({key})" for family, key in families.items())
        faults.append(f"it mixes formats: {said}")
    faults.extend(missing)
    named = {".".join((*parts[:1], name)): entry for (parts, name), entry in entries.items()}
    _check_told(named, families, faults)
    return named


def _check_told(
    entries: Mapping[str, _Entry], families: Mapping[str, str], faults: list[str]
) -> None:
    """A kohya-ss file has an alpha for each layer or, from the first versions, for none."""
    without = [name for name, e in entries.items() if "alpha" not in e.tensors]
    if KOHYA not in families or not without:
        return
    if len(without) < len(entries):
        faults.extend(f"{name}: its alpha is missing, others have one" for name in without)
    else:
        log.warning("the file has no alphas: each is taken to be its layer's rank (scale 1)")


def _find(
    key: Key, components: Mapping[str, Component]
) -> tuple[Component, tuple[Piece, ...]] | str:
    wanted = key.components or tuple(components)
    present = [components[name] for name in wanted if name in components]
    if not present:
        given = ", ".join(components)
        return f"{key.name}: it belongs to the {wanted[0]}, the model given is the {given}"
    for component in present:
        if key.underscored and key.name in component.ambiguous:
            return f"{key.name}: two layers of the model have this name with underscores"
        table = component.underscored if key.underscored else component.dotted
        if key.name in table:
            return component, table[key.name]
    return f"{key.name}: the model has no such layer"


def _add_alphas(
    entries: Mapping[str, _Entry], metadata: Mapping[str, str], faults: list[str]
) -> None:
    """Alphas from the file's tensors, else from the settings that diffusers writes beside them."""
    told = _settings(metadata, faults)
    for name, entry in entries.items():
        alpha = entry.tensors.get("alpha")
        down = entry.tensors.get("down")
        rank = 1 if down is None or not down.ndim else down.shape[0]
        if alpha is not None:
            entry.alpha = float(alpha) if alpha.numel() == 1 else math.nan
            if not math.isfinite(entry.alpha) or entry.alpha <= 0:
                faults.append(f"{name}: its alpha is {alpha.tolist()}, not one number above 0")
        else:
            config = told.get(entry.component.kind) or told.get("")
            module = entry.pieces[0].module
            entry.alpha = rank if config is None else config.scale_at(module, rank) * rank


def _settings(metadata: Mapping[str, str], faults: list[str]) -> dict[str, LoRAConfig]:
    """PEFT's settings in the metadata, by the part of a pipeline that they are of ("": of all)."""
    try:
        raw: Any = json.loads(metadata.get(METADATA, "{}"))
        if not isinstance(raw, dict):
            raise TypeError("no table")
        parts = {key.partition(".")[0] for key in raw if key.endswith(".lora_alpha")}
        parts |= {""} if "lora_alpha" in raw else set()
        return {part: _config(raw, f"{part}." if part else "", faults) for part in sorted(parts)}
    except (ValueError, TypeError, AttributeError, ConfigError, RecursionError) as error:
        said = error.cause if isinstance(error, ConfigError) else error
        faults.append(f"its {METADATA} cannot be read ({said})")
        return {}


def _config(raw: Mapping[str, Any], prefix: str, faults: list[str]) -> LoRAConfig:
    if raw.get(f"{prefix}use_dora"):
        faults.append(f"{METADATA}: DoRA's magnitudes are not read from image files")
    return LoRAConfig(
        alpha=raw[f"{prefix}lora_alpha"],
        alpha_pattern=raw.get(f"{prefix}alpha_pattern") or {},
        scaling="alpha/sqrt(rank)" if raw.get(f"{prefix}use_rslora") else "alpha/rank",
    )


def _layers(name: str, entry: _Entry, faults: list[str]) -> list[_Layer]:
    """The pairs of the model that an entry is."""
    down, up = entry.tensors.get("down"), entry.tensors.get("up")
    if down is None or up is None:
        faults.append(f"{name}: its {'down' if down is None else 'up'} is missing")
        return []
    rank = down.shape[0] if down.ndim else 0
    if "mid" in entry.tensors:
        mid = entry.tensors["mid"]
        if down.ndim != 4 or mid.ndim != 4 or mid.shape[1] != rank or down[0, 0].numel() != 1:
            faults.append(f"{name}: its mid {tuple(mid.shape)} and down do not multiply")
            return []
        # Tucker's form: the core holds the kernel, the down maps channels alone
        down = torch.einsum("okhw,ki->oihw", mid, down.flatten(1))
    if not rank or down.ndim < 2 or up.ndim < 2 or any(size != 1 for size in up.shape[2:]):
        faults.append(f"{name}: down {tuple(down.shape)} and up {tuple(up.shape)} are no pair")
        return []
    if up.shape[1] != down.shape[0]:
        faults.append(f"{name}: its down has rank {down.shape[0]}, its up {up.shape[1]}")
        return []
    modules = [entry.component.modules[piece.module] for piece in entry.pieces]
    sizes = [_weight_shape(module)[0] for module in modules]
    if up.shape[0] != sum(sizes) or not _kernel_fits(modules[0], down):
        weight = (sum(sizes), *_weight_shape(modules[0])[1:])
        faults.append(
            f"{name}: down {tuple(down.shape)} and up {tuple(up.shape)}, "
            f"but the model's weight is {weight}"
        )
        return []
    alpha = entry.alpha * down.shape[0] / rank if entry.alpha else float(rank)
    return [
        _Layer(entry.component.full(piece.module), down.flatten(1), rows, alpha, _form(module))
        for piece, module, rows in zip(
            entry.pieces, modules, _rows(up.flatten(1), sizes, entry.pieces), strict=True
        )
    ]


def _kernel_fits(module: nn.Module, down: Tensor) -> bool:
    """Whether the down maps the layer's input; a pointwise convolution and a matrix are one."""
    return _squeezed(_weight_shape(module)[1:]) == _squeezed(tuple(down.shape[1:]))


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight: Any = module.weight
    return tuple(weight.shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if any(size != 1 for size in shape[1:]) else shape[:1]


def _rows(up: Tensor, sizes: list[int], pieces: Sequence[Piece]) -> list[Tensor]:
    return [
        torch.cat(rows.chunk(2)[::-1]) if piece.swapped else rows.clone()
        for rows, piece in zip(up.split(sizes), pieces, strict=True)
    ]


def _form(module: nn.Module) -> Layer:
    groups = getattr(module, "groups", 1)
    plain = layer_of(module)
    return Layer(kind=plain.kind, kernel=plain.kernel, base_groups=groups)


def _adapter(pairs: Mapping[str, _Layer]) -> Adapter:
    ranks = {_exactly(name): layer.A.shape[0] for name, layer in pairs.items()}
    alphas = {_exactly(name): layer.alpha for name, layer in pairs.items()}
    usual_rank, usual_alpha = _usual(ranks), _usual(alphas)
    config = LoRAConfig(
        rank=usual_rank,
        alpha=usual_alpha,
        targets=tuple(pairs),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual_rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != usual_alpha},
    )
    return Adapter(
        config=config,
        pairs={name: (layer.A, layer.B) for name, layer in pairs.items()},
        layers={name: layer.layer for name, layer in pairs.items()},
    )


def _exactly(name: str) -> str:
    return "^" + name.replace(".", r"\.")


def _usual(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(dict.fromkeys(found), key=found.count)
