"""The largest number of bytes that live tensors held during a step."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEPS = 2
"""The second step meets what the first left behind: optimiser state, gradients not yet dropped."""


def peak_live_bytes(
    step: Callable[[], object], *, device: torch.device | str = "cpu", warmup: int = 1
) -> int:
    """Peak bytes of live tensors over two calls of `step`, after `warmup` calls of it.

    On the CPU it is what lives at the start plus the running sum of torch's own allocations and
    frees: exact for tensors, blind to what libraries allocate themselves. The high-water mark of
    the process is not used: it is inherited from whatever ran before. On CUDA it is
    `torch.cuda.max_memory_allocated`.

    `step` must drop at its end what it allocates for itself (gradients set to None). Everything
    that lives in this process counts, so measure in a process that holds nothing else.
    """
    device = torch.device(device)
    for _ in range(warmup):
        step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with _recording() as changes:
        for _ in range(STEPS):
            step()
    return live_bytes() + _highest_sum(changes)


@dataclass
class Watched:
    """`peak_bytes` of what ran inside `watch_peak`; None until it has ended."""

    peak_bytes: int | None = None


@contextmanager
def watch_peak(device: torch.device) -> Iterator[Watched]:
    """Measures the peak of what runs inside, as `peak_live_bytes` does; it runs once."""
    watched = Watched()
    gc.collect()  # what nobody can reach is not held
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield watched
        torch.cuda.synchronize(device)
        watched.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    held = live_bytes()
    with _recording() as changes:
        yield watched
    watched.peak_bytes = held + _highest_sum(changes)


def live_bytes() -> int:
    """Bytes of all CPU storages that a tensor of this process refers to, each once."""
    storages: dict[int, int] = {}
    # `type`, since `isinstance` wakes lazy and weak proxies
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    for tensor in tensors:
        for held in (tensor, tensor.grad if tensor.is_leaf else None):
            if held is None or held.layout != torch.strided:
                continue
            storage = held.untyped_storage()
            if storage.device.type == "cpu":  # a fake tensor says cpu, its storage meta
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def _recording() -> Iterator[list[int]]:
    """Bytes of every allocation (above 0) and free (below 0) on the CPU inside, in order."""
    changes: list[int] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes to stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        yield changes
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    records: list[Any] = results.kineto_results.events()  # its stub lacks what is asked here
    events = [
        (record.start_ns(), record.nbytes())
        for record in records
        if record.name() == "[memory]" and record.device_type().name == "CPU"
    ]
    events.sort(key=lambda event: event[0])
    changes += [num_bytes for _, num_bytes in events]


def _highest_sum(changes: list[int]) -> int:
    highest = current = 0
    for change in changes:
        current += change
        highest = max(highest, current)
    return highest
