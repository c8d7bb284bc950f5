"""The devices a plan can be made for: what they hold, and how fast they multiply."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from loralab.errors import PlanError, nearest

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    capacity_bytes: all that the driver shows. context_bytes: what a process takes of it before
    the first tensor. capability: CUDA's major compute capability; 0 on a CPU. Rates are dense
    matrix products' peak, operations a second (vendors' data sheets; fp32 without TF32).
    """

    name: str
    type: Literal["cuda", "cpu"]
    capacity_bytes: int
    context_bytes: int = 0
    capability: int = 0
    float32_rate: float = 0.0
    half_rate: float = 0.0
    bytes_per_second: float = 0.0

    def rate(self, dtype: str) -> float:
        """Peak matrix rate in a dtype, operations a second; 0 where unknown."""
        return self.float32_rate if dtype == "float32" else self.half_rate


def _gpu(
    name: str,
    mib: int,
    capability: int,
    single: float | int,
    half: float | int,
    gb_per_second: float | int,
) -> Device:
    # 0.27 GiB of context on an A10, measured there (process total less allocated and cached);
    # larger chips load more kernels.
    context = round(0.27 * GIB) if capability < 9 else round(0.5 * GIB)
    return Device(
        name,
        "cuda",
        mib * MIB,
        context,
        capability,
        single * 1e12,
        half * 1e12,
        gb_per_second * 1e9,
    )


# Capacities are what torch reports as total memory, a little below the name's.
DEVICES = MappingProxyType(
    {
        device.name: device
        for device in (
            _gpu("a10", 22600, 8, 31.2, 125, 600),
            _gpu("l4", 22560, 8, 30.3, 121, 300),
            _gpu("t4", 14910, 7, 8.1, 65, 320),
            _gpu("rtx3090", 24120, 8, 35.6, 71, 936),
            _gpu("rtx4090", 24080, 8, 82.6, 165, 1008),
            _gpu("l40s", 45460, 8, 91.6, 362, 864),
            _gpu("a100-40", 40330, 8, 19.5, 312, 1555),
            _gpu("a100-80", 81150, 8, 19.5, 312, 2039),
            _gpu("h100", 81090, 9, 67, 989, 3350),
            _gpu("h200", 143160, 9, 67, 989, 4800),
            _gpu("b200", 182600, 10, 75, 2250, 8000),
        )
    }
)

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GiB|MiB|GB|MB)", re.IGNORECASE)
_UNITS = {"gib": GIB, "mib": MIB, "gb": 10**9, "mb": 10**6}


def find_device(name: str) -> Device:
    """The device called `name`: one of `DEVICES`, a size ("16GiB": such a CUDA device), "cpu",
    "cuda" (the one here), or "auto" (whichever is here).

    Raises `PlanError` with the nearest name, and for sizes of zero.
    """
    wanted = name.strip().lower()
    if wanted in DEVICES:
        return DEVICES[wanted]
    if wanted == "auto":
        return find_device("cuda") if torch.cuda.is_available() else find_device("cpu")
    if wanted == "cpu":
        return Device("cpu", "cpu", _main_memory())
    if wanted.partition(":")[0] == "cuda":
        return _present_gpu(name)
    size = _SIZE.fullmatch(name.strip())
    if size is not None:
        capacity = round(float(size[1]) * _UNITS[size[2].lower()])
        if not capacity:
            raise PlanError(f"a device of {name} holds nothing", 'give a size such as "16GiB".')
        return replace(
            DEVICES["a10"],
            name=name.strip(),
            capacity_bytes=capacity,
            float32_rate=0.0,
            half_rate=0.0,
            bytes_per_second=0.0,
        )
    raise PlanError(
        f"unknown device {name!r}; {nearest(wanted, [*DEVICES, 'cpu', 'cuda'])}",
        'give one of the known devices, cpu, cuda (the one here), or a size such as "16GiB".',
    )


def _present_gpu(name: str) -> Device:
    if not torch.cuda.is_available():
        raise PlanError(
            f"device {name!r}: this machine has no CUDA device",
            f'plan for one by name ({", ".join(DEVICES)}) or by size, such as "16GiB".',
        )
    facts = torch.cuda.get_device_properties(torch.device(name))
    known = next(
        (
            d
            for d in DEVICES.values()
            if d.name.split("-")[0] in facts.name.lower().replace(" ", "")
        ),
        DEVICES["a10"],
    )
    return replace(known, name=name, capacity_bytes=facts.total_memory, capability=facts.major)


def _main_memory() -> int:
    """Bytes this process may use: the machine's memory, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text(encoding="ascii").strip()
        if text.isdigit():
            total = min(total, int(text))
    return total
