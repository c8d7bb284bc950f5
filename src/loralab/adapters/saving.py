"""Between a model and an adapter's folder."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attaching import check_name
from loralab.adapters.doubles import unsaved_names
from loralab.adapters.extracting import extract
from loralab.adapters.fingerprint import check_fingerprint, fingerprint
from loralab.adapters.fitting import biases_of, misfits, tensors_of_module
from loralab.adapters.hosting import host_of, plain_copy, plain_tensors
from loralab.adapters.installing import Installer, hosting
from loralab.adapters.peft_format import read_adapter, write_adapter
from loralab.adapters.probes import Probe
from loralab.adapters.targets import walk
from loralab.errors import AdapterError


def save_adapter(
    model: nn.Module,
    name: str,
    path: str | Path,
    *,
    probes: Sequence[Probe] | None = None,
    portable: bool = True,
) -> None:
    """Writes an attached adapter in PEFT's format, with every tensor that differs from the base.

    probes: travel with it from now on, in a file of their own; None keeps those it came with.
    portable: refuse what PEFT would apply otherwise than loralab does (see `write_adapter`).
    """
    if probes is not None:
        hosting(model, name).probes[name] = tuple(probes)
    write_adapter(extract(model, name), path, portable=portable)


def load_adapter(
    model: nn.Module, path: str | Path, name: str = "default", *, check_base: bool = True
) -> None:
    """Reads a PEFT folder and attaches it; see `install` for what is checked first."""
    with collector_paused():
        install(model, read_adapter(path), name, check_base=check_base, copy=False)


@contextmanager
def collector_paused() -> Iterator[None]:
    """No passes of the garbage collector meanwhile.

    A load makes thousands of objects, all of which stay. They would set off passes over everything
    that the process holds: the more adapters, the longer.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def install(
    model: nn.Module,
    adapter: Adapter,
    name: str = "default",
    *,
    check_base: bool = True,
    copy: bool = True,
) -> None:
    """Attaches an adapter that exists as a value, which stays as it is; its parameters train.

    copy=False: they share the value's memory, for models that only serve; what is written to one
    is written to both.

    Every name and shape is compared with the model's first. Raises `AdapterError` that lists all
    mismatches, or says how the base differs from the adapter's own (unless `check_base=False`);
    the model is as before then.
    """
    with collector_paused():
        modules = dict(walk(model))
        faults = misfits(adapter, modules)
        if faults:
            shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
            raise AdapterError(
                "\n  - ".join(["the adapter does not fit this model", *shown]),
                "load the model that it was made for; nothing was changed.",
            )
        host = host_of(model)
        if check_base and adapter.base is not None:
            here = host.fingerprint if host is not None else fingerprint(model)
            check_fingerprint(adapter.base, here or {})
        put_on(model, adapter, name, modules, copy=copy)


def put_on(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    modules: Mapping[str, nn.Module],
    *,
    copy: bool = False,
) -> None:
    """`install` of an adapter that was found to be of this base and to have no `misfits`.

    modules: the model's own, by name (`walk`), which stay the same whatever the model hosts.
    Raises `AdapterError` for a name that is taken or unusable.
    """
    check_name(model, name)
    copies = {path: _filled(modules[path], path, adapter, copy) for path in adapter.whole_modules}
    biases = biases_of(adapter)
    installer = Installer(model, adapter.config, name, modules)
    installer.host.facts[name] = dict(adapter.facts)
    installer.host.probes[name] = adapter.probes

    def own(tensor: Tensor, device: torch.device) -> Tensor:
        if not copy and tensor.dtype == torch.float32 and tensor.device == device:
            return tensor  # which `to` finds out in three times the time
        return tensor.to(device=device, dtype=torch.float32, copy=copy)

    for path, (A, B) in adapter.pairs.items():
        device = _device(modules[path])
        magnitude, bias = adapter.magnitudes.get(path), biases.pop(path, None)
        installer.pair(
            path,
            own(A, device),
            own(B, device),
            layer=adapter.layer(path),
            magnitude=None if magnitude is None else own(magnitude, device),
            bias=None if bias is None else own(bias, device),
        )
    for path, copied in copies.items():
        installer.whole(path, copied)
    for path, (indices, rows) in adapter.token_rows.items():
        device = _device(modules[path])
        installer.rows(path, indices.to(device), own(rows, device))
    for path, bias in biases.items():
        installer.own(path, {"bias": own(bias, _device(modules[path]))})


def _device(module: nn.Module) -> torch.device:
    return next(p for p in module._parameters.values() if p is not None).device


def _filled(module: nn.Module, path: str, adapter: Adapter, copy: bool) -> nn.Module:
    """An adapter's copy of the module with its tensors in it, which may be of other sizes (`Head`).

    A bias that the adapter has not is zero, one that the module has not is its own. What no file
    holds stays as it is (the factor of Gemma's embeddings).
    """
    copied = plain_copy(module)
    given, unsaved = tensors_of_module(adapter, path), unsaved_names(copied)
    for name, tensor in plain_tensors(copied).items():
        if name in given:
            tensor.data = given.pop(name).to(device=tensor.device, copy=copy)
        elif name not in unsaved:
            weight = adapter.extra[f"{path}.{name.removesuffix('bias')}weight"]
            tensor.data = tensor.new_zeros(weight.shape[0])
    for name, bias in given.items():
        owner = copied.get_submodule(name.rpartition(".")[0])
        owner.bias = nn.Parameter(bias.to(device=_device(module), copy=copy))
    return copied
