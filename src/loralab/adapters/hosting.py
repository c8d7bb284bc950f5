"""Modules that host adapters: their class gains a `forward` that follows the route.

A hosting module keeps its place, its name and its parameters; it only becomes a subclass of its
own class and gains a child `adapters`. So nothing else in the model has to know.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast, no_type_check

import torch
from torch import nn

from loralab.adapters.compiled import follow_compiled, register
from loralab.adapters.doubles import plain_copy, plain_tensors
from loralab.adapters.following import follow
from loralab.adapters.frozen_norms import (
    FrozenStatistics,
    frozen_class,
    mode_of,
    plain_class,
)
from loralab.adapters.items import Pair
from loralab.adapters.packed import follow_packed
from loralab.adapters.probes import Probe
from loralab.adapters.routes import Route, route_in_force
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import ADAPTERS, walk
from loralab.errors import AdapterError, RouteError

__all__ = [
    "Adapted",
    "Bank",
    "Host",
    "Pair",
    "adapted_modules",
    "dismiss",
    "host_of",
    "plain_copy",
    "plain_tensors",
    "welcome",
]


class Host:
    """What one model knows of its adapters; shared by all its hosting modules.

    configs: adapter -> settings, in the order of attachment.
    thawed: names of base parameters that were trainable before the first adapter came.
    facts: adapter -> what its file said of it.
    probes: adapter -> inputs and expected answers that its folder holds.
    fingerprint: the base's, once taken.
    row_dimensions: module -> the dimension of its input that holds the rows, where declared.
    seen_rows: the same as far as it was seen (None: in no dimension).
    seen_tokens: module -> whether its input was seen to be (rows, tokens, ...) of a packed batch.
    probed: the kinds of model inputs that were looked at for it.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoRAConfig] = {}
        self.thawed: set[str] = set()
        self.facts: dict[str, dict[str, str]] = {}
        self.probes: dict[str, tuple[Probe, ...]] = {}
        self.fingerprint: dict[str, str] | None = None
        self.row_dimensions: dict[str, int] = {}
        self.seen_rows: dict[str, int | None] = {}
        self.seen_tokens: dict[str, bool] = {}
        self.probed: set[tuple[Any, ...]] = set()


class Bank(nn.Module):
    """What one module hosts, by adapter: `Pair`, `Rows`, `Own`, or a whole copy of the module.

    Names go straight into the table of submodules, so that any name may be used that holds no dot.
    """

    def __init__(self, host: Host, path: str) -> None:
        super().__init__()
        self.host = host
        self.path = path  # the full name of the module, for messages
        self.number = register(self)  # what compiled code knows this bank by

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = register(self)  # a copy is another bank

    def get(self, name: str) -> Any:
        return self._modules.get(name)

    def put(self, name: str, item: nn.Module) -> None:
        self._modules[name] = item

    def remove(self, name: str) -> None:
        self._modules.pop(name, None)


class Adapted(nn.Module):
    """The part of a hosting module's class that follows the route."""

    adapters: Bank
    base_class: ClassVar[type[nn.Module]]

    @no_type_check
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return follow_compiled(self, self.adapters, super().forward, args, kwargs)
        bank = self.adapters
        route = route_in_force(bank.host)
        if route is None:
            _refuse_training_without_route(self)
            return super().forward(*args, **kwargs)
        if isinstance(route, Route) and route.packed is not None:
            return follow_packed(self, bank, route, super().forward, args, kwargs)
        return follow(self, bank, route, super().forward, args, kwargs)

    def _get_name(self) -> str:
        return plain_class(self.base_class).__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made on the fly, so copies and pickles make it again from the base class
        made_from = plain_class(self.base_class), issubclass(self.base_class, FrozenStatistics)
        return _rebuild, made_from, *super().__reduce_ex__(protocol)[2:]


def _rebuild(base: type[nn.Module], frozen: bool) -> nn.Module:
    cls = _adapted_class(frozen_class(base) if frozen else base)
    return cls.__new__(cls)


class AdaptedSequential(Adapted):
    """A hosting `nn.Sequential`: what it hosts is none of the members that it calls."""

    def _members(self) -> list[Any]:
        return [child for key, child in self._modules.items() if key != ADAPTERS]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._members())

    def __len__(self) -> int:
        return len(self._members())

    def __getitem__(self, index: Any) -> Any:
        found = self._members()[index]
        return nn.Sequential(*found) if isinstance(index, slice) else found


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    part = AdaptedSequential if issubclass(base, nn.Sequential) else Adapted
    own = {"__module__": base.__module__, "base_class": base}
    return cast(type[nn.Module], type(base.__name__, (part, base), own))


def host_of(model: nn.Module) -> Host | None:
    """What the model, or a part of it, knows of its adapters; None where it hosts none."""
    own = model.__dict__.get("_loralab_host")
    if own is not None:
        return own
    return next((module.adapters.host for _, module in adapted_modules(model)), None)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The hosting modules with their full names."""
    for name, module in walk(model):
        if isinstance(module, Adapted):
            yield name, module


def hosted_items(
    modules: Iterable[tuple[str, nn.Module]],
) -> list[tuple[str, nn.Module, Mapping[str, Any]]]:
    """Those of the named modules that host adapters, with what each hosts by adapter."""
    return [
        (name, module, cast(Bank, module._modules[ADAPTERS])._modules)
        for name, module in modules
        if isinstance(module, Adapted)
    ]


def welcome(module: nn.Module, host: Host, path: str) -> Bank:
    """Makes a module host adapters (once) and gives its bank."""
    if isinstance(module, Adapted):
        return module.adapters
    if (
        ADAPTERS in module._modules
        or ADAPTERS in module.__dict__
        or hasattr(type(module), ADAPTERS)
    ):
        raise AdapterError(
            f"module {path!r} has an attribute {ADAPTERS!r} of its own",
            "leave that module out with `exclude`.",
        )
    bank = Bank(host, path)
    bank.training = mode_of(module)
    module._modules[ADAPTERS] = bank
    _become(module, _adapted_class(type(module)))
    return cast(Adapted, module).adapters


def dismiss(module: nn.Module) -> None:
    """Makes a hosting module whose bank is empty what it was."""
    if isinstance(module, Adapted) and not module.adapters._modules:
        del module._modules[ADAPTERS]
        _become(module, module.base_class)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    # a subclass that adds methods alone; hints know no such assignment
    module.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_training_without_route(module: Adapted) -> None:
    if not (mode_of(module) and torch.is_grad_enabled()):
        return
    trainable = [
        name
        for name, item in module.adapters._modules.items()
        if item is not None and any(p.requires_grad for p in item.parameters())
    ]
    if trainable:
        raise RouteError(
            f"a training forward reached {module.adapters.path!r} with trainable adapters"
            f" ({', '.join(trainable)}) and no route",
            f'run it inside `with loralab.use(model, "{trainable[0]}"):`, or call `model.eval()`.'
            " A new thread does not see its parent's route (`loralab.adapters.carry`).",
        )
