"""Where PEFT would apply a pair otherwise than we do, or not at all."""

from collections.abc import Container, Mapping

from torch import nn

from loralab.adapters import convolutions
from loralab.adapters.adapter import Adapter
from loralab.adapters.peft_names import is_inner


def apart_at(modules: Mapping[str, nn.Module], path: str, paths: Container[str]) -> str:
    """How PEFT differs at this module of an adapter on those modules; empty where it does not."""
    module = modules[path]
    if isinstance(module, convolutions.CONVOLUTIONS):
        return convolutions.apart(module)
    owner, _, last = path.rpartition(".")
    alone = last == "out_proj" and owner not in paths
    if alone and isinstance(modules.get(owner), nn.MultiheadAttention):
        return "PEFT applies no adapter on an attention's output projection alone"
    return ""


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
    return faults
