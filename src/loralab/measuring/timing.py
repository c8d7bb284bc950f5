"""How long a step takes."""

import time
from collections.abc import Callable
from statistics import median

import torch


def median_step_seconds(
    step: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    repeats: int = 5,
) -> float:
    """Median wall-clock seconds of `repeats` calls of `step`, after `warmup` others.

    The median, since on a shared machine a few steps always take much longer.
    """
    device = torch.device(device)
    for _ in range(warmup):
        step()
    return median(_seconds(step, device) for _ in range(repeats))


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
