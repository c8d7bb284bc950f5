"""Running a module with other tensors than its own, without touching it.

`torch.func.functional_call` exchanges the tensors inside the module while it runs, which another
thread would see; a double shares everything with the module but its tables of tensors.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loralab.adapters.frozen_norms import plain_class
from loralab.adapters.targets import ADAPTERS, walk


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, its adapters left out."""
    tensors: dict[str, Tensor] = {}
    for prefix, inner in walk(module):
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def unsaved_names(module: nn.Module) -> set[str]:
    """Names among `plain_tensors` that no file of the module holds: its non-persistent buffers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, inner in walk(module)
        for name in inner._non_persistent_buffers_set
    }


def double(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow double, without adapters, that computes with these tensors."""
    made = copy.copy(module)
    made.__class__ = plain_class(type(module))  # it hosts nothing, and trains what is its own
    tables: dict[str, dict[str, Any]] = {
        "_parameters": dict(module._parameters),
        "_buffers": dict(module._buffers),
    }
    for table in tables.values():
        table.update({name: tensors[name] for name in table if name in tensors})
    made.__dict__.update(tables)
    made.__dict__["_modules"] = {
        name: None if child is None else double(child, _inside(tensors, name))
        for name, child in module._modules.items()
        if name != ADAPTERS
    }
    return made


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without any adapters; its tensors are copies too."""
    return copy.deepcopy(double(module, {}))


def _inside(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
