"""Modules that host adapters: their class gains a `forward` that follows the route.

A hosting module keeps its place, its name and its parameters; it only becomes a subclass of its
own class and gains a child `adapters`. So nothing else in the model has to know.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.adapters import layers
from loralab.adapters.adapter import Layer
from loralab.adapters.layers import Path
from loralab.adapters.routes import Group, Mix, Route, route_in_force
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import ADAPTERS, walk
from loralab.errors import AdapterError, RouteError


class Host:
    """What one model knows of its adapters; shared by all its hosting modules.

    configs: adapter -> settings, in the order of attachment.
    thawed: names of base parameters that were trainable before the first adapter came.
    facts: adapter -> what its file said of it.
    fingerprint: the base's, once taken.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoRAConfig] = {}
        self.thawed: set[str] = set()
        self.facts: dict[str, dict[str, str]] = {}
        self.fingerprint: dict[str, str] | None = None


class Pair(nn.Module):
    """One adapter's factors at one module: fp32, whatever the base's dtype."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, layer: Layer) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.dropout = dropout
        self.layer = layer

    def delta(
        self, module: nn.Module, path: Path, x: Tensor, weight: float | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """What this adapter adds to the module's output for these rows."""
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        return layers.low_rank(module, path, x, self.A, self.B, self.scale * weight, dtype)

    def extra_repr(self) -> str:
        rank, columns = self.A.shape
        return f"{columns} -> {rank} -> {self.B.shape[0]}, scale={self.scale:g}"


class Bank(nn.Module):
    """The adapters at one module, by name: a `Pair`, or an adapter's own copy of the module.

    Names go straight into the table of submodules, so that any name may be used that holds no dot.
    """

    def __init__(self, host: Host, path: str) -> None:
        super().__init__()
        self.host = host
        self.path = path  # the full name of the module, for messages

    def get(self, name: str) -> Any:
        return self._modules.get(name)

    def put(self, name: str, item: nn.Module) -> None:
        self._modules[name] = item

    def remove(self, name: str) -> None:
        self._modules.pop(name, None)


class Adapted(nn.Module):
    """The part of a hosting module's class that follows the route."""

    adapters: Bank

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bank = self.adapters
        route = route_in_force(bank.host)
        if route is None:
            _refuse_training_without_route(self)
            return super().forward(*args, **kwargs)
        return _follow(self, bank, route, super().forward, args, kwargs)

    def _get_name(self) -> str:
        return _base_class(self).__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made on the fly, so copies and pickles make it again from the base class
        return _rebuild, (_base_class(self),), *super().__reduce_ex__(protocol)[2:]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _adapted_class(base)
    return cls.__new__(cls)


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (Adapted, base), {"__module__": base.__module__})


def _base_class(module: nn.Module) -> type[nn.Module]:
    """The class that a hosting module had before."""
    return type(module).__mro__[2]


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]


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


def welcome(module: nn.Module, host: Host, path: str) -> Bank:
    """Makes a module host adapters (once) and gives its bank."""
    if isinstance(module, Adapted):
        return module.adapters
    if ADAPTERS in module._modules or hasattr(module, ADAPTERS):
        raise AdapterError(
            f"module {path!r} has an attribute {ADAPTERS!r} of its own",
            "leave that module out with `exclude`.",
        )
    module.add_module(ADAPTERS, Bank(host, path))
    _become(module, _adapted_class(type(module)))
    return cast(Adapted, module).adapters


def dismiss(module: nn.Module) -> None:
    """Makes a hosting module whose bank is empty what it was."""
    if isinstance(module, Adapted) and not module.adapters._modules:
        del module._modules[ADAPTERS]
        _become(module, _base_class(module))


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without any adapters; the tensors are copied too."""
    copied = copy.deepcopy(module, _without_banks(module))
    for inner in copied.modules():
        if isinstance(inner, Adapted):
            inner._modules.pop(ADAPTERS, None)
            _become(inner, _base_class(inner))
    return copied


def _without_banks(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy that leaves the adapters out."""
    return {id(inner.adapters): None for inner in module.modules() if isinstance(inner, Adapted)}


def _refuse_training_without_route(module: Adapted) -> None:
    if not (module.training and torch.is_grad_enabled()):
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
            " A new thread does not see its parent's route.",
        )


def _follow(
    module: Adapted, bank: Bank, route: Route, base: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    if route.num_rows is None or not route.is_mixed:
        mix = _present(bank, route.mixes[0])
        if not mix:
            return base(*args, **kwargs)
        if _has_whole(bank, mix):
            return _run_whole(module, bank, mix, args, kwargs)
        y = base(*args, **kwargs)
        return _add_to_all(module, bank, mix, _input(args, kwargs), y)
    present = {mix: _present(bank, mix) for mix in route.rows_of_mix}
    if not any(present.values()):
        return base(*args, **kwargs)
    _check_rows(module, bank, route, args, kwargs)
    if any(_has_whole(bank, mix) for mix in present.values()):
        return _run_by_mix(module, bank, route, present, base, args, kwargs)
    y = base(*args, **kwargs)
    return _add_by_row(module, bank, route, _input(args, kwargs), y)


def _present(bank: Bank, mix: Mix) -> Mix:
    """The part of a mix that this module hosts."""
    return tuple((name, weight) for name, weight in mix if name in bank._modules)


def _is_pair(bank: Bank, name: str) -> bool:
    return isinstance(bank.get(name), Pair)


def _has_whole(bank: Bank, mix: Mix) -> bool:
    return any(not _is_pair(bank, name) for name, _ in mix)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _add_to_all(module: Adapted, bank: Bank, mix: Mix, x: Tensor, y: Tensor) -> Tensor:
    path = cast(Path, layers.path_of(module))
    for name, weight in mix:
        y = y + bank.get(name).delta(module, path, x, weight, y.dtype)
    return y


def _add_by_row(module: Adapted, bank: Bank, route: Route, x: Tensor, y: Tensor) -> Tensor:
    """Each adapter is applied to its own rows only, so that rows never meet."""
    path = cast(Path, layers.path_of(module))
    for name, group in route.groups.items():
        pair = bank.get(name)
        if pair is None:
            continue
        rows = route.index(group.rows, y.device)
        taken = x[group.span] if group.span is not None else x.index_select(0, rows)
        weight = group.weight
        if weight is None:
            weight = _row_weights(route, group, taken, y)
        y = y.index_add(0, rows, pair.delta(module, path, taken, weight, y.dtype))
    return y


def _row_weights(route: Route, group: Group, x: Tensor, y: Tensor) -> Tensor:
    weights = route.coefficients(group, y)
    return weights.view(-1, *(1 for _ in y.shape[1:]))


def _check_rows(
    module: Adapted, bank: Bank, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = _input(args, kwargs)
    if x.ndim == 0 or x.shape[0] != route.num_rows:
        raise RouteError(
            f"module {bank.path!r} was given an input of shape {tuple(x.shape)}, whose first"
            f" dimension is not the {route.num_rows} rows of the route",
            "give one entry a row of the batch; where this module's first dimension is no row,"
            " use one adapter for the whole batch, or leave the module out with `exclude`.",
        )


def _run_by_mix(
    module: Adapted,
    bank: Bank,
    route: Route,
    present: dict[Mix, Mix],
    base: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Runs the module once for each distinct mix, on the rows that share it."""
    x = _input(args, kwargs)
    outputs, order = [], []
    for mix, rows in route.rows_of_mix.items():
        taken = x.index_select(0, route.index(rows, x.device))
        if _has_whole(bank, present[mix]):
            y = _run_whole(module, bank, present[mix], (taken,), {})
        else:
            y = _add_to_all(module, bank, present[mix], taken, base(taken))
        outputs.append(y)
        order.extend(rows)
    back = torch.tensor(order, device=x.device).argsort()
    return torch.cat(outputs).index_select(0, back)


def _run_whole(module: Adapted, bank: Bank, mix: Mix, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Runs the adapters' own copies of the module, and adds the pairs of those that have one."""
    copies = [(bank.get(name), weight) for name, weight in mix if not _is_pair(bank, name)]
    pairs = tuple((name, weight) for name, weight in mix if _is_pair(bank, name))
    y = stand_in(module, mixed_tensors(module, copies))(*args, **kwargs)
    return _add_to_all(module, bank, pairs, _input(args, kwargs), y) if pairs else y


def mixed_tensors(
    module: nn.Module, copies: Sequence[tuple[nn.Module, float]]
) -> dict[str, Tensor]:
    """A whole module's tensors in a mix: the base's plus the weighted deltas, in its dtype."""
    base = plain_tensors(module)
    if len(copies) == 1 and copies[0][1] == 1:  # its own tensors: norm statistics stay updated
        return {name: own.to(base[name].dtype) for name, own in plain_tensors(copies[0][0]).items()}
    mixed = dict(base)
    for copied, weight in copies:
        for name, own in plain_tensors(copied).items():
            if own.is_floating_point():
                mixed[name] = mixed[name] + (weight * (own - base[name])).to(base[name].dtype)
    return mixed


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, its adapters left out."""
    tensors: dict[str, Tensor] = {}
    for prefix, inner in walk(module):
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def stand_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow double of a module that computes with these tensors in place of its own.

    The module itself is not touched, so that other threads may run it meanwhile.
    """
    double = copy.copy(module)
    if isinstance(double, Adapted):
        _become(double, _base_class(double))
    own = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    for table in own.values():
        table.update({name: tensors[name] for name in table if name in tensors})
    double.__dict__.update(own)
    double.__dict__["_modules"] = {
        name: child and stand_in(child, _inside(tensors, name))
        for name, child in module._modules.items()
        if name != ADAPTERS
    }
    return double


def _inside(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
