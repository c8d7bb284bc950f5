"""For which kind of device choices are made: the one that tensors are on, or that a plan is for.

And how tensors get there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_planned_kind: ContextVar[str | None] = ContextVar("planned_kind", default=None)


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, steps choose what they would on a device of this kind ("cuda"), wherever they run."""
    token = _planned_kind.set(kind)
    try:
        yield
    finally:
        _planned_kind.reset(token)


def device_kind(place: Tensor | torch.device) -> str:
    """The kind of device ("cpu", "cuda") that choices are made for: the plan's, or the tensor's.

    Code that runs in a training step and branches on a device asks here, not `tensor.device`.
    """
    device = place.device if isinstance(place, Tensor) else place
    return _planned_kind.get() or device.type


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device; a GPU's host does not wait for what was enqueued before.

    From memory that may be paged out it would: such a copy begins when the device has no work left.
    """
    if device_kind(device) != "cuda" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
