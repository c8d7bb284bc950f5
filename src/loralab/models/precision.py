"""Which dtype a machine computes faster in: measured, since its name does not tell.

Half precision is about twice as fast where the processor has the instructions, and many times
slower where it has not.
"""

import functools
import time
from dataclasses import dataclass

import torch

_SIDE = 512
_SECONDS = 0.1
_CLEARLY_FASTER = 1.2


@dataclass(frozen=True)
class Precision:
    """The dtype chosen, and how many times as fast bfloat16 multiplies matrices as float32."""

    dtype: str
    bfloat16_speedup: float

    def __str__(self) -> str:
        return f"{self.dtype}: bfloat16 is {self.bfloat16_speedup:.2g} times as fast as float32"


@functools.cache
def choose_dtype(device: str) -> Precision:
    """bfloat16 where it is clearly faster on the device, else float32; measured once a process."""
    speedup = _products_per_second(device, torch.bfloat16) / _products_per_second(
        device, torch.float32
    )
    return Precision("bfloat16" if speedup > _CLEARLY_FASTER else "float32", speedup)


def _products_per_second(device: str, dtype: torch.dtype) -> float:
    with torch.random.fork_rng():
        a = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _SECONDS or count < 3:
        _ = (a @ a).sum().item()  # waits for the device
        count += 1
        if count == 1:
            began = time.perf_counter()  # the first product sets things up
    return count / passed
