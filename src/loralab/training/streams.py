"""Random streams that never mix: one seed, one stream a purpose.

Data order, initialisation and dropout each have their own stream, so that two methods with the
same seed see the same batches in the same order whatever they draw elsewhere.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

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
