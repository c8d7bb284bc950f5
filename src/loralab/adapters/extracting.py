"""What a model hosts, as values and as parameters."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.adapter import Adapter, Layer
from loralab.adapters.doubles import plain_tensors
from loralab.adapters.heads import label_names
from loralab.adapters.hosting import adapted_modules
from loralab.adapters.installing import hosting
from loralab.adapters.items import Own, Pair, Rows
from loralab.adapters.noise import table
from loralab.adapters.peft_limits import apart_at, bystanders, other_names
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.step import mask_dtype
from loralab.adapters.targets import walk


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Full name -> parameter of everything the adapter trains: A, B, whole modules' copies."""
    hosting(model, name)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in adapted_modules(model):
        item = module.adapters.get(name)
        if item is None:
            continue
        prefix = f"{path}.adapters.{name}" if path else f"adapters.{name}"
        for key, parameter in item.named_parameters():
            if id(parameter) not in seen:  # rows of a tied embedding are one parameter
                seen.add(id(parameter))
                found[f"{prefix}.{key}"] = parameter
    return found


def dropout_tables(model: nn.Module, name: str) -> list[Tensor]:
    """The tables that adapter `name` takes its dropout masks from, made now where they were not.

    They outlive the model: a process keeps them for its next steps.
    """
    found: dict[int, Tensor] = {}
    for _, module in adapted_modules(model):
        pair, weight = module.adapters.get(name), getattr(module, "weight", None)
        if isinstance(pair, Pair) and pair.dropout and isinstance(weight, Tensor):
            made = table(pair.A.shape[-1], pair.dropout, mask_dtype(weight), weight.device)
            found[id(made)] = made
    return list(found.values())


def extract(model: nn.Module, name: str) -> Adapter:
    """An attached adapter as a value; its tensors are detached copies on the CPU.

    An adapter whose initialiser moved the base comes out as a plain one for the untouched base, of
    twice the rank.
    """
    return collect(model, name, value_of)


def collect(model: nn.Module, name: str, value: Callable[[Tensor], Tensor]) -> Adapter:
    """`extract`; value: what becomes of each tensor."""
    host = hosting(model, name)
    parts = Parts(value)
    for path, module in adapted_modules(model):
        item = module.adapters.get(name)
        if item is not None:
            parts.add(path, item)
    modules = dict(walk(model))
    others = other_names(modules)
    for path in parts.pairs:
        reason = apart_at(modules, path, parts.pairs, others)
        if reason:
            parts.layers[path] = replace(parts.layers[path], apart=reason)
    return Adapter(
        config=_config_of(host.configs[name], parts),
        pairs=parts.pairs,
        extra=parts.extra,
        magnitudes=parts.magnitudes,
        token_rows=parts.token_rows,
        layers=parts.layers,
        whole_modules=tuple(parts.whole),
        repeated={
            f"{path}.{key}": value(tensor)
            for path in bystanders(modules, parts.whole)
            for key, tensor in plain_tensors(modules[path]).items()
        },
        base=host.fingerprint or None,
        facts={**model_facts(model, parts.pairs), **host.facts.get(name, {})},
        probes=host.probes.get(name, ()),
    )


class Parts:
    """What an adapter consists of, collected module by module."""

    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        self.value = value
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.layers: dict[str, Layer] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        self.token_rows: dict[str, tuple[Tensor, Tensor]] = {}
        self.whole: list[str] = []
        self.doubled = False  # an initialiser moved the base, so pairs have twice the rank

    def add(self, path: str, item: nn.Module) -> None:
        if isinstance(item, Pair):
            A, B = item.factors()
            self.pairs[path] = (self.value(A), self.value(B))
            self.layers[path] = item.layer
            self.doubled |= A is not item.A
            if item.magnitude is not None:
                self.magnitudes[path] = self.value(item.magnitude)
            if item.bias is not None:
                self.extra[f"{path}.bias"] = self.value(item.bias)
        elif isinstance(item, Rows):
            if not item.tied:
                self.token_rows[path] = (self.value(item.indices), self.value(item.rows))
        else:
            if not isinstance(item, Own):
                self.whole.append(path)
            tensors = plain_tensors(item)
            self.extra.update({f"{path}.{key}": self.value(tensors[key]) for key in tensors})


def _config_of(config: LoRAConfig, parts: Parts) -> LoRAConfig:
    if not parts.doubled:
        return config
    growth = 2 if config.scaling == "alpha/rank" else math.sqrt(2)  # the scale stays
    return replace(
        config,
        init="kaiming",
        rank=2 * config.rank,
        alpha=growth * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )


def model_facts(model: nn.Module, pairs: Mapping[str, Any]) -> dict[str, str]:
    """What an adapter's file says of its base besides the fingerprint.

    ambiguous: last parts of names that also occur on modules without a pair, so that they cannot
    stand for the adapter's modules.
    """
    modules = dict(walk(model))
    ours = {path.rpartition(".")[2] for path in pairs}
    others = {path.rpartition(".")[2] for path in modules if path not in pairs}
    facts = {"model_class": type(model).__name__, "ambiguous": " ".join(sorted(ours & others))}
    if any(isinstance(modules[path], Conv1D) for path in pairs):
        facts["fan_in_fan_out"] = "true"
    config = getattr(model, "config", None)
    where = getattr(config, "_name_or_path", None)
    if isinstance(where, str) and where and not Path(where).is_absolute():
        facts["base_model"] = where  # a folder of this machine means nothing on another
    if getattr(config, "is_encoder_decoder", False):
        takes_text = getattr(model, "main_input_name", "") == "input_ids"
        facts["sequence_to_sequence"] = str(takes_text).lower()
    if "SequenceClassification" in facts["model_class"] and config is not None:
        facts["classifier"] = json.dumps(_classifier(config))
    return facts


def _classifier(config: Any) -> dict[str, Any]:
    """What a classifier's settings say beyond its weights: names of its classes, its pooling."""
    names, pooling = label_names(config), getattr(config, "loralab_head", {}).get("pooling")
    told: dict[str, Any] = {"labels": list(names)} if names else {}
    return told | ({} if pooling is None else {"pooling": pooling})


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers in the model's parameters; shared ones count once."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for p in parameters)


def value_of(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()
