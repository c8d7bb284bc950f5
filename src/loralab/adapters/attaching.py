"""Putting adapters on a model and taking them off."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn

from loralab.adapters import layers
from loralab.adapters.adapter import Adapter
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.hosting import (
    Host,
    Pair,
    adapted_modules,
    dismiss,
    host_of,
    plain_copy,
    plain_tensors,
    welcome,
)
from loralab.adapters.routes import Entry, Route, in_force, make_route
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import select, walk
from loralab.errors import AdapterError, RouteError, nearest
from loralab.lowrank import initialiser

WEIGHTLESS_INITS = frozenset({"kaiming", "gaussian", "orthogonal"})  # they read only the shape


def attach(
    model: nn.Module,
    config: LoRAConfig,
    name: str = "default",
    *,
    head: Literal["trained", "frozen"] = "trained",
    seed: int | None = None,
) -> None:
    """Freezes the base and gives the model a new adapter: A and B, fp32, in each target.

    A is drawn from a generator of its own at each module, made from `seed` (None: 0) and the
    module's name, so that it depends neither on the global generator nor on other modules.

    Raises `TargetError` where a target matches nothing, `AdapterError` where the name is taken or
    unusable, or where a freshly initialised head would stay untrained (unless `head="frozen"`).
    The model is as before when it raises.
    """
    check_name(model, name)
    pairs, whole = select(model, config)
    if head == "trained":
        _check_head(model, whole)
    modules = dict(walk(model))
    drawn = {path: draw(modules[path], path, config, seed or 0) for path in pairs}
    copies = {path: plain_copy(modules[path]) for path in whole}
    host = open_host(model)
    host.configs[name] = config
    for path, (A, B) in drawn.items():
        put_pair(host, modules[path], path, name, config, A, B)
    for path, copied in copies.items():
        put_whole(host, modules[path], path, name, copied)


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


def draw(module: nn.Module, path: str, config: LoRAConfig, seed: int) -> tuple[Tensor, Tensor]:
    """The pair (A, B) that training of this module starts from, on the module's device."""
    rank = config.rank_at(path)
    weight = cast(layers.Path, layers.path_of(module)).matrix(module).detach()
    scale = config.scale_at(path, rank)
    if weight.is_meta:
        return weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
    device = weight.device
    if config.init in WEIGHTLESS_INITS:  # drawn on the CPU: the same on every device
        weight = torch.empty(1).expand(weight.shape)
    generator = Generator(weight.device).manual_seed(_seed_at(seed, path))
    start = initialiser(config.init)(weight, rank, scale, generator)
    A = start.A
    if config.init == "kaiming" and isinstance(module, nn.Embedding):
        A = A * math.sqrt(weight.shape[1])  # a one-hot input has one entry, not `in` of them
    return A.to(device), start.B.to(device)


def _seed_at(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def open_host(model: nn.Module) -> Host:
    """The model's host; made on first use, when the base is frozen and its fingerprint taken."""
    host = host_of(model)
    if host is None:
        host = Host()
        host.fingerprint = fingerprint(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                host.thawed.add(name)
                parameter.requires_grad_(False)
    model.__dict__["_loralab_host"] = host
    return host


def put_pair(
    host: Host,
    module: nn.Module,
    path: str,
    name: str,
    config: LoRAConfig,
    A: Tensor,
    B: Tensor,
) -> None:
    """Hands a module its pair."""
    scale = config.scale_at(path, A.shape[0])
    pair = Pair(A, B, scale, config.dropout, layers.layer_of(module))
    pair.training = module.training
    welcome(module, host, path).put(name, pair)


def put_whole(host: Host, module: nn.Module, path: str, name: str, copied: nn.Module) -> None:
    """Hands a module an adapter's own copy of it, with fp32 parameters that train."""
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    welcome(module, host, path).put(name, copied)


def detach(model: nn.Module, name: str) -> None:
    """Takes an adapter off; after the last one the model is as before, frozen flags included."""
    host = _hosting(model, name)
    if merged_name(model) == name:
        raise AdapterError(
            f"adapter {name!r} is merged into this model", "call `loralab.restore(model)` first."
        )
    for _, module in list(adapted_modules(model)):
        module.adapters.remove(name)
        dismiss(module)
    del host.configs[name]
    host.facts.pop(name, None)
    if not host.configs:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in host.thawed:
                parameter.requires_grad_(True)
        model.__dict__.pop("_loralab_host", None)


def hosted(model: nn.Module) -> tuple[str, ...]:
    """Names of the attached adapters, in the order of attachment."""
    host = host_of(model)
    return tuple(host.configs) if host else ()


@contextmanager
def use(model: nn.Module, route: Entry | Sequence[Entry]) -> Iterator[None]:
    """Puts a route in force for forwards of this thread or task inside the `with`.

    route: an adapter's name, None (the base), {name: weight} (a mix, deltas add up), or a list of
    these with one entry a row of the batch. Raises `RouteError` for unknown names at once, and
    at the forward where rows cannot be told apart.
    """
    host = host_of(model)
    made = make_route(route, tuple(host.configs) if host else ())
    if host is None:
        yield
        return
    with in_force(host, _without_merged(model, made)):
        yield


def merged_name(model: nn.Module) -> str | None:
    """The adapter that `merge_in_place` has put into this model's weights."""
    return model.__dict__.get("_loralab_merged", (None,))[0]


def _without_merged(model: nn.Module, route: Route) -> Route:
    """The route; an adapter that is in the weights already adds nothing more to them."""
    merged = merged_name(model)
    if merged is None:
        return route
    if route.num_rows is None and route.mixes == (((merged, 1.0),),):
        return Route(((),), None)
    raise RouteError(
        f"adapter {merged!r} is merged into this model: it serves no other route",
        "call `loralab.restore(model)` first.",
    )


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Full name -> parameter of everything the adapter trains: A, B, whole modules' copies."""
    _hosting(model, name)
    found: dict[str, nn.Parameter] = {}
    for path, module in adapted_modules(model):
        item = module.adapters.get(name)
        if item is not None:
            prefix = f"{path}.adapters.{name}" if path else f"adapters.{name}"
            found.update({f"{prefix}.{key}": value for key, value in item.named_parameters()})
    return found


def extract(model: nn.Module, name: str) -> Adapter:
    """An attached adapter as a value; its tensors are detached copies on the CPU."""
    host = _hosting(model, name)
    pairs, extra, kinds, whole = {}, {}, {}, []
    for path, module in adapted_modules(model):
        item = module.adapters.get(name)
        if isinstance(item, Pair):
            pairs[path] = (_value(item.A), _value(item.B))
            kinds[path] = item.layer
        elif item is not None:
            whole.append(path)
            tensors = plain_tensors(item)
            extra.update({f"{path}.{key}": _value(value) for key, value in tensors.items()})
    return Adapter(
        config=host.configs[name],
        pairs=pairs,
        extra=extra,
        layers=kinds,
        whole_modules=tuple(whole),
        base=host.fingerprint or None,
        facts={**model_facts(model), **host.facts.get(name, {})},
    )


def model_facts(model: nn.Module) -> dict[str, str]:
    """What an adapter's file says of its base besides the fingerprint."""
    facts = {"model_class": type(model).__name__}
    config = getattr(model, "config", None)
    where = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if isinstance(where, str) and where:
        facts["base_model"] = where
    return facts


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers in the model's parameters; shared ones count once."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for p in parameters)


def _value(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _hosting(model: nn.Module, name: str) -> Host:
    host = host_of(model)
    if host is None or name not in host.configs:
        known = tuple(host.configs) if host else ()
        hint = nearest(name, known) if known else "it hosts none."
        raise AdapterError(f"the model hosts no adapter {name!r}", hint)
    return host
