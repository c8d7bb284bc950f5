"""Activations kept in the host's memory between forward and backward."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from loralab.placement import device_kind

WORTH_MOVING_BYTES = 1 << 20


def offloaded(model: nn.Module) -> AbstractContextManager[object]:
    """Inside, what autograd keeps goes to the host (pinned for a GPU) and comes back when needed.

    Parameters and buffers stay, and so does what is too small to be worth the way.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> tuple[Tensor, torch.device | None]:
        if tensor.nbytes < WORTH_MOVING_BYTES or tensor.untyped_storage()._cdata in own:
            return tensor, None
        pinned = device_kind(tensor) == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)  # in the same layout
        return host.copy_(tensor, non_blocking=pinned), tensor.device

    def unpack(packed: tuple[Tensor, torch.device | None]) -> Tensor:
        tensor, device = packed
        return tensor if device is None else tensor.to(device, non_blocking=True, copy=True)

    return saved_tensors_hooks(pack, unpack)
