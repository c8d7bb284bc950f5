"""Where PEFT would apply an adapter otherwise than we do, or not at all."""

from collections.abc import Container, Iterable, Mapping

from torch import nn

from loralab.adapters import convolutions
from loralab.adapters.adapter import Adapter
from loralab.adapters.peft_names import is_inner

Modules = Mapping[str, nn.Module]
# what PEFT calls modules of its own; it looks for whole modules by the endings of names
PEFT_MODULES = (
    "base_layer",
    "default",
    "lora_A",
    "lora_B",
    "lora_dropout",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def apart_at(modules: Modules, path: str, paths: Container[str], others: Mapping[str, str]) -> str:
    """How PEFT differs at this module of an adapter on those modules; empty where it does not.

    others: `other_names` of the model.
    """
    module = modules[path]
    if path in others:
        return f"it is also called {others[path]!r}, and under that name PEFT leaves it alone"
    if isinstance(module, convolutions.CONVOLUTIONS):
        return convolutions.apart(module)
    owner, _, last = path.rpartition(".")
    alone = last == "out_proj" and owner not in paths
    if alone and isinstance(modules.get(owner), nn.MultiheadAttention):
        return "PEFT applies no adapter on an attention's output projection alone"
    return ""


def other_names(modules: Modules) -> dict[str, str]:
    """Name -> a second name of the same module, for those that have one."""
    names = {id(module): name for name, module in modules.items()}
    found: dict[str, str] = {}
    for name, module in modules.items():
        for key, child in module._modules.items():
            full = f"{name}.{key}" if name else key
            first = names.get(id(child), full)
            if first != full:
                found[first] = full
    return found


def bystanders(modules: Modules, whole: Iterable[str]) -> list[str]:
    """Modules that PEFT would also train whole, as their names end alike without a dot."""
    wanted = tuple(whole)
    return [
        name
        for name in modules
        if any(name.endswith(w) and name != w and not name.endswith("." + w) for w in wanted)
        and not any(name.startswith(w + ".") for w in wanted)
    ]


def beyond_peft(adapter: Adapter) -> list[str]:
    """What of an adapter PEFT's files cannot hold, module by module; empty for most adapters."""
    faults = []
    for path, (A, _) in adapter.pairs.items():
        layer = adapter.layer(path)
        if layer.apart:
            faults.append(f"{path}: {layer.apart}")
        if layer.base_groups > 1 and path in adapter.magnitudes:
            faults.append(f"{path}: PEFT has no DoRA for grouped convolutions")
        if is_inner(path, adapter.pairs):
            rank = adapter.pairs[path.removesuffix(".out_proj")][0].shape[0]
            if A.shape[0] != rank:
                faults.append(
                    f"{path}: its rank is {A.shape[0]}; PEFT gives it that of its attention, {rank}"
                )
    for path in adapter.whole_modules:
        taken = next((name for name in PEFT_MODULES if name.endswith(path)), None)
        if taken is not None:
            faults.append(f"{path}: PEFT would take its own {taken!r} for it, by the ending")
    return faults
