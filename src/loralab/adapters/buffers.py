"""Memory for whole files of tensors, kept for the next file once nobody holds it.

Fresh memory is slow: filling 20 MB takes 2 ms where the pages are there, and 10 to 60 ms where the
system has to give them first, most of it in virtual machines.
"""

import threading
import weakref

import torch
from jaxtyping import UInt8
from torch import Tensor

MIB = 2**20
LEAST_BYTES = MIB  # smaller pieces come from the allocator as any others
MOST_KEPT_BYTES = 256 * MIB


class Buffers:
    """Lends memory and keeps what comes back, at most so many bytes of it; any thread may ask."""

    def __init__(self, max_bytes: int = MOST_KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: list[Tensor] = []
        self._lock = threading.RLock()  # memory may come back while a thread holds it

    def take(self, num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
        """Memory that holds anything; it comes back when no tensor on it is left."""
        if num_bytes < LEAST_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8)
        memory = self._find(num_bytes)
        if memory is None:
            memory = torch.empty(-(-num_bytes // MIB) * MIB, dtype=torch.uint8)
        lent = memory.numpy()[:num_bytes]  # every tensor made of it holds this array
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return torch.from_numpy(lent)

    @property
    def num_bytes(self) -> int:
        """Of the memory that waits."""
        return sum(map(len, self._kept))

    def _find(self, num_bytes: int) -> Tensor | None:
        with self._lock:
            fitting = [m for m in self._kept if num_bytes <= len(m) <= 2 * num_bytes]
            if not fitting:
                return None
            chosen = min(fitting, key=len)
            self._kept = [memory for memory in self._kept if memory is not chosen]
            return chosen

    def _take_back(self, memory: Tensor) -> None:
        with self._lock:
            self._kept.append(memory)
            while self.num_bytes > self.max_bytes:
                self._kept.pop(0)


_buffers = Buffers()


def fresh_bytes(num_bytes: int) -> UInt8[Tensor, " num_bytes"]:
    """Memory of this process's `Buffers`: it holds anything, and is aligned for every dtype."""
    return _buffers.take(num_bytes)
