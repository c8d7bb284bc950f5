"""Between a model and an adapter's folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from loralab.adapters import layers
from loralab.adapters.adapter import Adapter
from loralab.adapters.attaching import check_name
from loralab.adapters.extracting import extract
from loralab.adapters.fingerprint import check_fingerprint, fingerprint
from loralab.adapters.hosting import host_of, plain_copy, plain_tensors
from loralab.adapters.installing import Installer, bias_of, hosting
from loralab.adapters.peft_format import read_adapter, write_adapter
from loralab.adapters.probes import Probe
from loralab.adapters.targets import missing_targets, walk
from loralab.errors import AdapterError


def save_adapter(
    model: nn.Module, name: str, path: str | Path, *, probes: Sequence[Probe] | None = None
) -> None:
    """Writes an attached adapter in PEFT's format, with every tensor that differs from the base.

    probes: travel with it from now on, in a file of their own; None keeps those it came with.
    """
    if probes is not None:
        hosting(model, name).probes[name] = tuple(probes)
    write_adapter(extract(model, name), path)


def load_adapter(
    model: nn.Module, path: str | Path, name: str = "default", *, check_base: bool = True
) -> None:
    """Reads a PEFT folder and attaches it; see `install` for what is checked first."""
    install(model, read_adapter(path), name, check_base=check_base)


def install(
    model: nn.Module, adapter: Adapter, name: str = "default", *, check_base: bool = True
) -> None:
    """Attaches an adapter that exists as a value; its parameters train.

    Every name and shape is compared with the model's first. Raises `AdapterError` that lists all
    mismatches, or says how the base differs from the adapter's own (unless `check_base=False`);
    the model is as before then.
    """
    check_name(model, name)
    modules = dict(walk(model))
    biases = _biases(adapter)
    faults = [
        *_faults_of_pairs(adapter, modules),
        *_faults_of_whole(adapter, modules),
        *_faults_of_rows(adapter, modules),
        *_faults_of_biases(biases, modules),
        *_faults_of_repeated(adapter, modules),
        *(
            f"{path}: the config targets it, the adapter has no pair for it"
            for path in missing_targets(modules, adapter.config, adapter.pairs)
        ),
    ]
    if faults:
        shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise AdapterError(
            "\n  - ".join(["the adapter does not fit this model", *shown]),
            "load the model that it was made for; nothing was changed.",
        )
    host = host_of(model)
    if check_base and adapter.base is not None:
        own = host.fingerprint if host is not None else fingerprint(model)
        check_fingerprint(adapter.base, own or {})
    copies = {path: _filled(modules[path], path, adapter) for path in adapter.whole_modules}
    installer = Installer(model, adapter.config, name, modules)
    installer.host.facts[name] = dict(adapter.facts)
    installer.host.probes[name] = adapter.probes
    for path, (A, B) in adapter.pairs.items():
        device = _device(modules[path])
        magnitude, bias = adapter.magnitudes.get(path), biases.pop(path, None)
        installer.pair(
            path,
            _own(A, device),
            _own(B, device),
            magnitude=None if magnitude is None else _own(magnitude, device),
            bias=None if bias is None else _own(bias, device),
        )
    for path, copied in copies.items():
        installer.whole(path, copied)
    for path, (indices, rows) in adapter.token_rows.items():
        device = _device(modules[path])
        installer.rows(path, indices.to(device), _own(rows, device))
    for path, bias in biases.items():
        installer.own(path, {"bias": _own(bias, _device(modules[path]))})


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.float32)


def _device(module: nn.Module) -> torch.device:
    return next(iter(module._parameters.values())).device  # pyright: ignore


def _biases(adapter: Adapter) -> dict[str, Tensor]:
    """Module -> the bias that the adapter trains, of modules that it does not train whole."""
    return {
        name.removesuffix(".bias"): tensor
        for name, tensor in adapter.extra.items()
        if name.endswith(".bias") and not any(_inside(name, w) for w in adapter.whole_modules)
    }


def _inside(name: str, owner: str) -> bool:
    return name.startswith(owner + ".")


def _faults_of_biases(biases: dict[str, Tensor], modules: dict[str, nn.Module]) -> list[str]:
    faults = []
    for path, bias in biases.items():
        own = bias_of(modules[path]) if path in modules else None
        if own is None:
            faults.append(f"{path}.bias: the model has no such tensor")
        elif own.shape != bias.shape:
            faults.append(f"{path}.bias: {tuple(bias.shape)}, the model's is {tuple(own.shape)}")
    return faults


def _faults_of_repeated(adapter: Adapter, modules: dict[str, nn.Module]) -> list[str]:
    """Base tensors in the file that are not the model's: it was resized or trained whole."""
    faults = []
    for name, tensor in adapter.repeated.items():
        path, _, last = name.rpartition(".")
        own = modules[path]._parameters.get(last) if path in modules else None
        if own is None or own.shape != tensor.shape:
            shape = None if own is None else tuple(own.shape)
            faults.append(f"{name}: {tuple(tensor.shape)}, the model's is {shape}")
        elif not torch.equal(own.to(torch.bfloat16), tensor.to(own.device, torch.bfloat16)):
            faults.append(f"{name}: the file holds other values than the model; train it whole")
    return faults


def _faults_of_rows(adapter: Adapter, modules: dict[str, nn.Module]) -> list[str]:
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


def _faults_of_pairs(adapter: Adapter, modules: dict[str, nn.Module]) -> list[str]:
    faults = []
    for path, (A, B) in adapter.pairs.items():
        module = modules.get(path)
        way = layers.path_of(module) if module is not None else None
        if module is None or way is None:
            what = "the model has no such module" if module is None else type(module).__name__
            faults.append(f"{path}: {what}")
            continue
        if (B.shape[0], A.shape[1]) != way.features(module):
            out, into = way.features(module)
            faults.append(f"{path}: delta of {B.shape[0]} x {A.shape[1]}, weight of {out} x {into}")
        magnitude = adapter.magnitudes.get(path)
        if magnitude is not None and magnitude.shape != (B.shape[0],):
            faults.append(f"{path}: magnitude of shape {tuple(magnitude.shape)}")
    return faults


def _faults_of_whole(adapter: Adapter, modules: dict[str, nn.Module]) -> list[str]:
    faults = []
    for path in adapter.whole_modules:
        if path not in modules:
            faults.append(f"{path}: the model has no such module")
            continue
        own = plain_tensors(modules[path])
        given = _tensors_of(adapter, path)
        faults += [f"{path}.{name}: missing from the adapter" for name in own.keys() - given.keys()]
        faults += [
            f"{path}.{name}: the model has no such tensor" for name in given.keys() - own.keys()
        ]
        faults += [
            f"{path}.{name}: {tuple(given[name].shape)}, the model's is {tuple(own[name].shape)}"
            for name in own.keys() & given.keys()
            if own[name].shape != given[name].shape
        ]
    return faults


def _tensors_of(adapter: Adapter, path: str) -> dict[str, Tensor]:
    prefix = f"{path}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in adapter.extra.items()
        if name.startswith(prefix)
    }


def _filled(module: nn.Module, path: str, adapter: Adapter) -> nn.Module:
    """An adapter's copy of the module with its tensors in it."""
    copied = plain_copy(module)
    given = _tensors_of(adapter, path)
    for name, tensor in plain_tensors(copied).items():
        tensor.data = given[name].to(device=tensor.device, dtype=given[name].dtype)
    return copied
