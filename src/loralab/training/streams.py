"""Random streams that never mix: one seed, one stream a purpose.

Data order, initialisation and dropout each have their own stream, so that two methods with the
same seed see the same batches in the same order whatever they draw elsewhere.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal["data", "initialisation", "dropout"]


def stream_seed(seed: int, purpose: Purpose, step: int = 0) -> int:
    """The seed (63 bits) of one purpose's stream; `step` gives every step its own."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def dropout_stream(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Dropout inside draws from the stream of this step alone; the outer generators are restored.

    A resumed run needs no saved generator state: the masks depend on `(seed, step)` only.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stream_seed(seed, "dropout", step))
        yield


class RunStream:
    """The dropout stream of one run among several: `dropout_stream` as a generator of its own."""

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        own = stream_seed(seed, "dropout", step)
        self.generator = torch.Generator(device).manual_seed(own)
        self.cpu = self.generator if device.type == "cpu" else torch.Generator().manual_seed(own)
        self._default = default_generator(device)

    def state(self) -> Tensor:
        """Where the stream stands."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Put the stream there."""
        self.generator.set_state(state)

    def set_default_state(self, state: Tensor) -> None:
        """Put the default generator there, inside `as_default`."""
        self._default.set_state(state)

    @contextmanager
    def as_default(self) -> Iterator[None]:
        """Inside, the device's default generator is this stream; it is restored afterwards."""
        outer = self._default.get_state()
        self._default.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(self._default.get_state())
            self._default.set_state(outer)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that draws on a device without a word."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or torch.cuda.current_device()]
    return torch.default_generator
