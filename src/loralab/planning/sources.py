"""Where the shapes of a model come from: a preset, a catalogue name, a config file, a module."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from loralab.catalogue import ENTRIES
from loralab.config import RunConfig
from loralab.errors import ModelError, nearest
from loralab.models import PRESETS, build_model, model_folder, quiet


def meta_model(
    config: RunConfig, model: nn.Module | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """The model of `config`, or a copy of `model`, on the meta device.

    `model.name` is a preset, a catalogue name, a config.json or its folder (weights are not
    needed), or a hub id. Raises `ModelError` for a name that leads nowhere, with the nearest one,
    and for a configuration that lacks a field.
    """
    if model is not None:
        return _shapes(model)
    return _built(config, torch.device("meta"))


def drawn_model(config: RunConfig, device: torch.device) -> nn.Module:
    """The model of `config` on `device`, its weights drawn at random; errors as `meta_model`."""
    return _built(config, device)


def _built(config: RunConfig, device: torch.device) -> nn.Module:
    settings = config.model
    try:
        return build_model(
            find_architecture(settings.name),
            task=settings.text_task,
            num_labels=settings.num_labels,
            dtype=settings.dtype,
            head_bias=settings.head_bias,
            head_dropout=settings.head_dropout,
            dropout=settings.dropout,
            pooling=settings.pooling,
            device=device,
        )
    except (AttributeError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise ModelError(
            f"the configuration of {settings.name} makes no model: {error}",
            "complete config.json; its fields are those of transformers' class for its model_type.",
        ) from error


def find_architecture(name: str) -> str | PretrainedConfig:
    """A preset's name, or the transformers configuration that `name` leads to."""
    if name in PRESETS:
        return name
    path = Path(name).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return _read(path if path.is_file() else path / "config.json")
    known = [*PRESETS, *(entry for entry, facts in ENTRIES.items() if facts.kind == "model")]
    if name not in ENTRIES and "/" not in name:
        raise ModelError(
            f"unknown model {name!r}; {nearest(name.lower(), known)}",
            "give a preset, a catalogue name, a folder with config.json, or a hub id (org/name).",
        )
    return _read(model_folder(name) / "config.json")


def _read(path: Path) -> PretrainedConfig:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "give a config.json.") from None
    faults = _faults(facts)
    if faults:
        raise ModelError(
            f"{path}: " + "; ".join(faults),
            "complete it; its fields are those of transformers' class for its model_type.",
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} describes no model that transformers knows: {error}",
            "update transformers where the model is newer than it.",
        ) from error


_SIZES = (
    ("hidden_size", "n_embd", "d_model", "dim"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    ("vocab_size",),
)


def _faults(facts: Any) -> list[str]:
    """Sizes that are missing (a default would plan another model) or not above zero."""
    if not isinstance(facts, dict):
        return ["holds no table of fields"]
    if "model_type" not in facts:
        return ["model_type is missing"]
    inner = facts.get("text_config", facts)
    missing = [names[0] for names in _SIZES if not any(name in inner for name in names)]
    faults = [f"{name} is missing" for name in missing]
    for names in (*_SIZES, ("intermediate_size",), ("num_key_value_heads",)):
        for name in names:
            value = inner.get(name)
            if isinstance(value, int | float) and value <= 0:
                faults.append(f"{name} is {value}, which is not above zero")
    return faults


def _shapes(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A copy of a module on the meta device; weights of the given one are not copied."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            made: nn.Module = model()
            return made
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _meta(tensor) for tensor in tensors})


def _meta(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(shape, requires_grad=tensor.requires_grad)
    return shape
