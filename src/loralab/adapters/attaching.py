"""Putting adapters on a model and taking them off."""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn

from loralab.adapters import layers
from loralab.adapters.frozen_norms import thaw_norms
from loralab.adapters.hosting import adapted_modules, dismiss
from loralab.adapters.installing import (
    Installer,
    bias_of,
    copies_of,
    fresh_copy,
    hosting,
    remove_hooks,
    token_modules,
)
from loralab.adapters.peft_limits import apart_at, other_names
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import follow_attention, packed_faults, row_conflicts, select, walk
from loralab.adapters.using import hosted, merged_name
from loralab.errors import AdapterError, TargetError
from loralab.lowrank import MOVES_THE_BASE, Factors, Initialiser, Start, initialiser, kaiming

logger = logging.getLogger("loralab")
WEIGHTLESS_INITS = frozenset({"kaiming", "gaussian", "orthogonal"})  # they read only the shape


def attach(
    model: nn.Module,
    config: LoRAConfig,
    name: str = "default",
    *,
    head: Literal["trained", "frozen"] = "trained",
    seed: int | None = None,
    starts: Mapping[str, Initialiser] | None = None,
) -> None:
    """Freezes the base and gives the model a new adapter: A and B, fp32, in each target.

    A is drawn from a generator of its own at each module, made from `seed` (None: 0) and the
    module's name, so that it depends neither on the global generator nor on other modules.
    `starts` gives the initialiser of single modules (by full name) where it is made from data
    (`eva_starts`, `lora_ga_starts`). An initialiser that moves the base moves only what this
    adapter sees of it.

    Raises `TargetError` where a target matches nothing, `AdapterError` where the name is taken or
    unusable, or where a freshly initialised head would stay untrained (unless `head="frozen"`).
    The model is as before when it raises.
    """
    check_name(model, name)
    _check_sizes(model)
    pairs, whole = select(model, config)
    if head == "trained":
        _check_head(model, whole)
    modules = dict(walk(model))
    faults: list[str] = []
    rows = token_modules(modules, config.token_rows, faults)
    faults += row_conflicts(modules, rows, {*pairs, *whole})
    faults += packed_faults(config, modules, pairs)
    if faults:
        raise TargetError("; ".join(faults), "see `loralab.targets(model)` for what there is.")
    _warn_of_limits(modules, pairs)
    config = follow_attention(config, pairs)
    drawn = {
        path: draw(modules[path], path, config, seed or 0, (starts or {}).get(path))
        for path in pairs
    }
    copies = copies_of(modules, whole)
    installer = Installer(model, config, name, modules)
    for path, start in drawn.items():
        _put_pair(installer, path, start)
    for path, copied in copies.items():
        installer.whole(path, copied)
    for path, indices in rows.items():
        table = cast(nn.Embedding, modules[path]).weight
        on_device = indices.to(table.device)
        installer.rows(path, on_device, fresh_copy(table[on_device]))
    if config.biases == "all":
        for path in _other_biases(modules, {*pairs, *whole}):
            bias = cast(Tensor, bias_of(modules[path]))
            installer.own(path, {"bias": fresh_copy(bias)})


def _check_sizes(model: nn.Module) -> None:
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise AdapterError(
            f"parameters without a size yet: {', '.join(lazy[:5])}",
            "run the model once on some input: lazy modules take their sizes from it.",
        )


def _warn_of_limits(modules: Mapping[str, nn.Module], pairs: Sequence[str]) -> None:
    """Says before any training what saving in PEFT's format will refuse."""
    others = other_names(modules)
    for path in pairs:
        reason = apart_at(modules, path, pairs, others)
        if reason:
            logger.warning("%s: %s; save the adapter with portable=False", path, reason)


def _put_pair(installer: Installer, path: str, start: Start) -> None:
    module, config = installer.modules[path], installer.config
    matrix = cast(layers.Path, layers.path_of(module)).matrix(module)
    bias = None if config.biases == "none" else bias_of(module)
    magnitude = None
    if config.dora:  # the base's own norm: B A is zero, or taken off the base, at the start
        magnitude = torch.linalg.vector_norm(matrix.detach(), dim=1, dtype=torch.float32)
    installer.pair(
        path,
        start.A,
        start.B,
        magnitude=magnitude,
        bias=None if bias is None else fresh_copy(bias),
        start=None if start.base_change is None else (start.A.clone(), start.B.clone()),
    )


def _other_biases(modules: Mapping[str, nn.Module], taken: set[str]) -> list[str]:
    """Modules with a bias that no pair and no whole copy already trains."""
    return [
        path
        for path, module in modules.items()
        if bias_of(module) is not None
        and path not in taken
        and not any(path.startswith(owner + ".") for owner in taken)
    ]


def check_name(model: nn.Module, name: str) -> None:
    """Raises `AdapterError` for a name that is taken or cannot be part of a parameter's name."""
    if not name or "." in name or "/" in name or "\\" in name or not name.isprintable():
        raise AdapterError(
            f"{name!r} cannot name an adapter: it is part of parameter names",
            "give a name without dots, slashes and control characters.",
        )
    if name in hosted(model):
        raise AdapterError(
            f"the model hosts an adapter {name!r} already",
            "choose another name, or call `loralab.detach(model, name)` first.",
        )


def _check_head(model: nn.Module, whole: Sequence[str]) -> None:
    fresh = getattr(model, "_loralab_fresh_head", None)
    if fresh is not None and not any(fresh == w or fresh.startswith(w + ".") for w in whole):
        raise AdapterError(
            f"the head {fresh!r} was initialised just now and this adapter would not train it",
            f'add whole_modules=[{fresh!r}] to its config, or pass head="frozen" to keep it'
            " random.",
        )


def draw(
    module: nn.Module, path: str, config: LoRAConfig, seed: int, strategy: Initialiser | None = None
) -> Start:
    """What training of this module starts from, on the module's device."""
    rank = config.rank_at(path)
    weight = cast(layers.Path, layers.path_of(module)).matrix(module).detach()
    if weight.is_meta:
        shapes = (rank, weight.shape[1]), (weight.shape[0], rank)
        A, B = (weight.new_empty(shape, dtype=torch.float32) for shape in shapes)
        moved = Factors(A, B) if config.init in MOVES_THE_BASE else None
        return Start(A, B, base_change=moved)
    device = weight.device
    if strategy is None and config.init in WEIGHTLESS_INITS:  # on the CPU: alike on every device
        weight = torch.empty(1).expand(weight.shape)
    generator = Generator(weight.device).manual_seed(_seed_at(seed, path))
    make = initialiser(config.init) if strategy is None else strategy
    start = make(weight, rank, config.scale_at(path, rank), generator)
    A = start.A
    if make is kaiming and isinstance(module, nn.Embedding):
        A = A * math.sqrt(weight.shape[1])  # a one-hot input has one entry, not `in` of them
    return Start(A.to(device), start.B.to(device), start.base_change)


def _seed_at(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def detach(model: nn.Module, name: str) -> None:
    """Takes an adapter off; after the last one the model is as before, frozen flags included."""
    host = hosting(model, name)
    if merged_name(model) == name:
        raise AdapterError(
            f"adapter {name!r} is merged into this model", "call `loralab.restore(model)` first."
        )
    for _, module in list(adapted_modules(model)):
        module.adapters.remove(name)
        dismiss(module)
    del host.configs[name]
    host.facts.pop(name, None)
    host.probes.pop(name, None)
    if not host.configs:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in host.thawed:
                parameter.requires_grad_(True)
        remove_hooks(model)
        thaw_norms(model)
        model.__dict__.pop("_loralab_host", None)
