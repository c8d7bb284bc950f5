"""Whether an adapter fits a model: every name and shape is compared before anything is touched."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loralab.adapters import layers
from loralab.adapters.adapter import Adapter
from loralab.adapters.convolutions import shape_of_delta
from loralab.adapters.doubles import plain_tensors, unsaved_names
from loralab.adapters.heads import Head
from loralab.adapters.installing import bias_of
from loralab.adapters.peft_limits import apart_at, other_names
from loralab.adapters.targets import (
    missing_targets,
    no_low_rank_form,
    packed_faults,
    row_conflicts,
)

Modules = Mapping[str, nn.Module]


def misfits(adapter: Adapter, modules: Modules, head: Head | None = None) -> list[str]:
    """Everything in which the adapter does not fit the modules of a model; empty where it fits.

    head: of a model that takes adapters with any number of outputs.
    """
    return [
        *_faults_of_pairs(adapter, modules),
        *packed_faults(adapter.config, modules, adapter.pairs),
        *_faults_of_whole(adapter, modules, head),
        *_faults_of_rows(adapter, modules),
        *row_conflicts(modules, adapter.token_rows, {*adapter.pairs, *adapter.whole_modules}),
        *_faults_of_biases(biases_of(adapter), modules),
        *_faults_of_repeated(adapter, modules),
        *(
            f"{path}: the config targets it, the adapter has no pair for it"
            for path in missing_targets(modules, adapter.config, adapter.pairs)
        ),
    ]


def biases_of(adapter: Adapter) -> dict[str, Tensor]:
    """Module -> the bias that the adapter trains, of modules that it does not train whole."""
    return {
        name.removesuffix(".bias"): tensor
        for name, tensor in adapter.extra.items()
        if name.endswith(".bias") and not any(_inside(name, w) for w in adapter.whole_modules)
    }


def _inside(name: str, owner: str) -> bool:
    return name.startswith(owner + ".")


def _faults_of_biases(biases: dict[str, Tensor], modules: Modules) -> list[str]:
    faults = []
    for path, bias in biases.items():
        own = bias_of(modules[path]) if path in modules else None
        if own is None:
            faults.append(f"{path}.bias: the model has no such tensor")
        elif own.shape != bias.shape:
            faults.append(f"{path}.bias: {tuple(bias.shape)}, the model's is {tuple(own.shape)}")
    return faults


def _faults_of_repeated(adapter: Adapter, modules: Modules) -> list[str]:
    """Base tensors in the file that are not the model's: it was resized or trained whole."""
    faults = []
    for name, tensor in adapter.repeated.items():
        path, _, last = name.rpartition(".")
        own = modules[path]._parameters.get(last) if path in modules else None
        if own is None or own.shape != tensor.shape:
            shape = None if own is None else tuple(own.shape)
            faults.append(f"{name}: {tuple(tensor.shape)}, the model's is {shape}")
        elif not tensor.is_meta and not torch.equal(
            own.to(torch.bfloat16), tensor.to(own.device, torch.bfloat16)
        ):
            faults.append(f"{name}: the file holds other values than the model; train it whole")
    return faults


def _faults_of_rows(adapter: Adapter, modules: Modules) -> list[str]:
    faults = []
    for path, (indices, rows) in adapter.token_rows.items():
        module = modules.get(path)
        if not isinstance(module, nn.Embedding):
            faults.append(f"{path}: token rows, but the model has no such embedding")
            continue
        if rows.ndim != 2 or rows.shape != (len(indices), module.embedding_dim):
            faults.append(f"{path}: {len(indices)} token rows of shape {tuple(rows.shape)}")
        if (
            len(indices)
            and not 0 <= int(indices.min()) <= int(indices.max()) < module.num_embeddings
        ):
            faults.append(f"{path}: token rows outside its {module.num_embeddings}")
    return faults


def _faults_of_pairs(adapter: Adapter, modules: Modules) -> list[str]:
    faults = []
    others = other_names(modules)
    for path, (A, B) in adapter.pairs.items():
        module = modules.get(path)
        if module is None:
            faults.append(f"{path}: the model has no such module")
            continue
        way = layers.path_of(module)
        if way is None:
            faults.append(f"{path} {no_low_rank_form(module)}")
            continue
        layer = adapter.layer(path)
        wanted = shape_of_delta(module, way, layer)
        if (B.shape[0], A.shape[1]) != wanted:
            weight = " x ".join(map(str, way.features(module)))
            faults.append(f"{path}: delta of {B.shape[0]} x {A.shape[1]}, weight of {weight}")
        magnitude = adapter.magnitudes.get(path)
        if magnitude is not None and magnitude.shape != (B.shape[0],):
            faults.append(f"{path}: magnitude of shape {tuple(magnitude.shape)}")
        reason = apart_at(modules, path, adapter.pairs, others)
        if reason and not layer.apart:
            faults.append(f"{path}: {reason}, so that its adapter means something else here")
    return faults


def _faults_of_whole(adapter: Adapter, modules: Modules, head: Head | None) -> list[str]:
    faults = []
    for path in adapter.whole_modules:
        if path not in modules:
            faults.append(f"{path}: the model has no such module")
            continue
        given = tensors_of_module(adapter, path)
        if head is not None and head.holds(path):
            must, may = head.shapes(modules[path], given)
        else:
            tensors = plain_tensors(modules[path])
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            may = {name: shapes.pop(name) for name in unsaved_names(modules[path]) & shapes.keys()}
            must = shapes
        own = must | may
        faults += [f"{path}.{n}: missing from the adapter" for n in must.keys() - given.keys()]
        faults += [f"{path}.{n}: the model has no such tensor" for n in given.keys() - own.keys()]
        faults += [
            f"{path}.{name}: {tuple(given[name].shape)}, the model's is {own[name]}"
            for name in own.keys() & given.keys()
            if own[name] != tuple(given[name].shape)
        ]
    return faults


def tensors_of_module(adapter: Adapter, path: str) -> dict[str, Tensor]:
    prefix = f"{path}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in adapter.extra.items()
        if name.startswith(prefix)
    }
