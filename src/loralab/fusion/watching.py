"""What a model's blocks and their leaves do in one forward of a few tokens."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class Leaf(NamedTuple):
    """A module without children, the tensor it read and what it gave."""

    module: nn.Module
    read: Any
    gave: Any


@dataclass
class Seen:
    """One call of a block: what it was given, what its leaves did, what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Leaf] = field(default_factory=list)
    output: Any = None


def watch(model: nn.Module, layers: nn.ModuleList) -> list[dict[nn.Module, Seen]]:
    """Two forwards of two rows of six tokens: all of them real, and with padding in the second."""
    padded = torch.ones(2, 6, dtype=torch.long, device=next(model.parameters()).device)
    padded[1, 4:] = 0
    with ExitStack() as stack:
        seen: dict[nn.Module, Seen] = {}
        for layer in layers:
            _watch_block(layer, seen, stack)
        trials = []
        for mask in (None, padded):
            run_few_tokens(model, mask)
            trials.append(dict(seen))
            seen.clear()
        return trials


def own_modules(layer: nn.Module) -> Iterator[nn.Module]:
    """The block's own modules, without what they host of adapters."""
    for name, module in layer.named_modules():
        if "adapters" not in name.split("."):
            yield module


def run_few_tokens(model: nn.Module, mask: Tensor | None) -> Any:
    """The model's output for two rows of six tokens."""
    device = next(model.parameters()).device
    mask = torch.ones(2, 6, dtype=torch.long, device=device) if mask is None else mask
    arguments: dict[str, Any] = {"attention_mask": mask}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    embedding = cast(Any, model).get_input_embeddings()
    ids = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    return model(input_ids=ids % embedding.weight.shape[0], **arguments)


def _watch_block(layer: nn.Module, seen: dict[nn.Module, Seen], stack: ExitStack) -> None:
    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[layer] = Seen(args, kwargs)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        seen[layer].output = output

    def leaf(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and output is not args[0]:  # an idle dropout gives back what it got
            seen[layer].leaves.append(Leaf(module, args[0], output))

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [module.register_forward_hook(leaf) for module in _leaves(layer)]
    handles.append(layer.register_forward_hook(leave))
    for handle in handles:
        stack.callback(handle.remove)


def _leaves(layer: nn.Module) -> Iterator[nn.Module]:
    for module in own_modules(layer):
        if not set(module._modules) - {"adapters"}:
            yield module
