"""Handing the parts of an adapter to the modules of a model."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Layer
from loralab.adapters.convolutions import layer_at
from loralab.adapters.doubles import plain_copy
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.frozen_norms import freeze_norms, mode_of
from loralab.adapters.hosting import Host, adapted_modules, host_of, welcome
from loralab.adapters.items import Own, Pair, Rows
from loralab.adapters.rows import probe_rows
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import walk
from loralab.adapters.tying import tied_tables
from loralab.errors import AdapterError, nearest


def open_host(model: nn.Module) -> Host:
    """The model's host; made on first use, when the base is frozen and its fingerprint taken.

    Frozen with its norms' running statistics (`frozen_norms`).
    """
    host = host_of(model)
    if host is None:
        host = Host()
        host.fingerprint = fingerprint(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                host.thawed.add(name)
                parameter.requires_grad_(False)
        freeze_norms(model)
    model.__dict__["_loralab_host"] = host
    if not any(hook is probe_rows for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(probe_rows, with_kwargs=True)
    return host


def hosting(model: nn.Module, name: str) -> Host:
    """The model's host. Raises `AdapterError` where it does not host the adapter."""
    host = host_of(model)
    if host is None or name not in host.configs:
        known = tuple(host.configs) if host else ()
        hint = nearest(name, known) if known else "attach or load an adapter first."
        raise AdapterError(f"the model hosts no adapter {name!r}", hint)
    return host


class Installer:
    """Puts one adapter's parts on a model, module by module."""

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig,
        name: str,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.modules = dict(walk(model)) if modules is None else modules
        self.host = open_host(model)
        self.config, self.name = config, name
        self.host.configs[name] = config

    def pair(
        self,
        path: str,
        A: Tensor,
        B: Tensor,
        *,
        layer: Layer | None = None,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A factor pair, with its magnitude and bias where the adapter trains them.

        layer: what the adapter's value says of the pair, where it comes from one.
        """
        module = self.modules[path]
        pair = Pair(
            A,
            B,
            self.config.scale_at(path, A.shape[0]),
            self.config.dropout,
            layer_at(module, layer),
            magnitude=magnitude,
            bias=bias,
            start=start,
        )
        self._put(path, pair)

    def own(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Some tensors of the module in the place of the base's."""
        self._put(path, Own({name: tensor.float() for name, tensor in tensors.items()}))

    def whole(self, path: str, copied: nn.Module) -> None:
        """An adapter's own copy of the module."""
        for parameter in copied.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._put(path, copied)

    def rows(self, path: str, indices: Tensor, rows: Tensor) -> None:
        """Rows of an embedding, and of every module whose weight is declared tied to it."""
        item = Rows(indices, rows)
        self._put(path, item)
        for other in tied_tables(self.modules, path):
            tied = Rows(indices, rows, tied=True)
            tied.rows = item.rows  # one parameter on both sides
            self._put(other, tied)

    def _put(self, path: str, item: nn.Module) -> None:
        module = self.modules[path]
        if item._modules:
            item.train(mode_of(module))
        else:
            item.__dict__["training"] = mode_of(module)
        parent_path, _, last = path.rpartition(".")
        parent = self.modules.get(parent_path)
        if last == "out_proj" and isinstance(parent, nn.MultiheadAttention):
            welcome(parent, self.host, parent_path)  # it reads the projection without calling it
        if isinstance(parent, nn.TransformerEncoderLayer):
            decline_fast_path(parent)
        welcome(module, self.host, path).put(self.name, item)


def decline_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keeps torch's fused inference path, which reads weights past their modules, switched off.

    torch leaves that path where a hook is present.
    """
    if not any(hook is _no_fast_path for hook in layer._forward_pre_hooks.values()):
        layer.register_forward_pre_hook(_no_fast_path)


def _no_fast_path(module: nn.Module, args: Any) -> None:
    return None


def remove_hooks(model: nn.Module) -> None:
    """Takes our hooks off where nothing is hosted below them any more."""
    for _, module in walk(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (_no_fast_path, probe_rows) and not any(adapted_modules(module)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def bias_of(module: nn.Module) -> Tensor | None:
    """The parameter that is called `bias`."""
    return module._parameters.get("bias")


def fresh_copy(tensor: Tensor) -> Tensor:
    """A detached fp32 copy on the same device."""
    return tensor.detach().to(torch.float32, copy=True)


def copies_of(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> dict[str, nn.Module]:
    """Plain copies of the modules with these names."""
    return {path: plain_copy(modules[path]) for path in paths}


def token_modules(
    modules: Mapping[str, nn.Module], wanted: Mapping[str, Sequence[int]], faults: list[str]
) -> dict[str, Tensor]:
    """Full name of the embedding -> row numbers; faults name what is no embedding or row."""
    found: dict[str, Tensor] = {}
    for suffix, indices in wanted.items():
        paths = [p for p in modules if p == suffix or p.endswith("." + suffix)]
        tables = [p for p in paths if isinstance(modules[p], nn.Embedding)]
        if not tables:
            known = [p for p, module in modules.items() if isinstance(module, nn.Embedding)]
            hint = nearest(suffix, known) if known else "the model has no embedding"
            faults.append(f"token_rows {suffix!r} matches no embedding; {hint}")
        for path in tables:
            size = cast(nn.Embedding, modules[path]).num_embeddings
            outside = [index for index in indices if not 0 <= index < size]
            if outside or len(set(indices)) < len(indices) or not indices:
                faults.append(
                    f"token_rows {suffix!r}: {outside or list(indices)} are no distinct rows of"
                    f" {size}"
                )
            found[path] = torch.tensor(list(indices), dtype=torch.int64)
    return found
