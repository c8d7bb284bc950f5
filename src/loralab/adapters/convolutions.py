"""What grouped, dilated and otherwise padded convolutions are to PEFT, which knows none of these.

Here every group applies the same A to its own channels. In PEFT's form A sees the channels of all
groups, without the base's groups, dilation and kind of padding, and B (out, rank / groups) maps
each group's share of the rank. So ours is PEFT's with one block of A for each group, zeros beside.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters.adapter import Layer
from loralab.adapters.layers import Path, layer_of

LINEAR = Layer()
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_at(module: nn.Module, given: Layer | None = None) -> Layer:
    """The `Layer` of a pair at this module; given: what an adapter's value says of the pair."""
    if isinstance(module, nn.Linear):  # most of all modules, by far
        return LINEAR
    layer = layer_of(module)
    if isinstance(module, CONVOLUTIONS):
        parts = 1 if given is None else given.groups
        return replace(layer, groups=parts, base_groups=module.groups)
    return layer


def shape_of_delta(module: nn.Module, path: Path, layer: Layer) -> tuple[int, int]:
    """(rows of B, columns of A) that a pair of that form must have at this module."""
    out, columns = path.features(module)
    return out, columns * layer.groups  # in PEFT's form A sees all channels


def apart(module: nn.Module) -> str:
    """How the convolution differs from what PEFT applies A with; empty where it does not.

    See `_ConvNd.update_layer` in peft/tuners/lora/layer.py (0.21.2).
    """
    conv: Any = module
    if all(size == 1 for size in conv.kernel_size):
        return ""
    if any(step > 1 for step in conv.dilation):
        return f"PEFT applies A without the convolution's dilation {conv.dilation}"
    padded = conv.padding == "same" or (conv.padding != "valid" and any(conv.padding))
    if padded and conv.padding_mode != "zeros":
        return f"PEFT pads for A with zeros, the convolution with {conv.padding_mode!r}"
    return ""


def to_peft(
    A: Float[Tensor, "rank _columns"], layer: Layer
) -> Float[Tensor, "_peft_rank _channels *kernel"]:
    """A as PEFT's kernel: (groups * rank, in_channels, *kernel), B stays as it is."""
    kernel, groups = layer.kernel, layer.base_groups
    if layer.groups > 1 or groups == 1:
        return A.view(A.shape[0], -1, *kernel)
    own = A.view(A.shape[0], -1, *kernel)
    blocks = A.new_zeros(groups, own.shape[0], groups, *own.shape[1:])
    for group in range(groups):
        blocks[group, :, group] = own
    return blocks.flatten(2, 3).flatten(0, 1)


def from_peft(
    A: Float[Tensor, "_peft_rank _channels *kernel"], groups: int
) -> Float[Tensor, "_rank _columns"] | None:
    """The A that every group applies; None where the groups' A differ or see other channels."""
    if A.shape[1] % groups:
        return None
    blocks = A.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    own = blocks[0, :, 0]
    for group in range(groups):
        others = [other for other in range(groups) if other != group]
        if not torch.equal(blocks[group, :, group], own) or bool(blocks[group, :, others].any()):
            return None
    return own.flatten(1).clone()
