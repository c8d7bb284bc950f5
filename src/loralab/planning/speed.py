"""How long a step takes: its matrix products and its traffic over what a machine can do.

The machine that is here is calibrated once (under a minute, kept in the cache); of others the
vendor's peak is taken at the share of it that training reaches.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from loralab.catalogue import cache_folder
from loralab.config import Dtype
from loralab.files import write_text
from loralab.planning.accounts import Accounts
from loralab.planning.devices import Device

REACHED_SHARE = 0.45
"""Of a vendor's peak, by training steps of transformers; between a quarter and three quarters."""

TRAFFIC_FACTOR = 3
"""Bytes moved for each byte a step allocates: written once, read by what follows and backward."""

_SIDE = 1024
_CALIBRATION_SECONDS = 2.0
_COPY_BYTES = 1 << 26


@dataclass(frozen=True)
class Speed:
    """Operations and bytes a second, seconds a call; `error_bar` is relative."""

    matrix_rate: float | int
    bytes_per_second: float | int
    call_seconds: float | int
    error_bar: float | int


def step_seconds(accounts: Accounts, speed: Speed) -> float:
    """Seconds of one step: products, traffic and calls one after the other."""
    products = accounts.flops / speed.matrix_rate
    traffic = TRAFFIC_FACTOR * accounts.allocated_bytes / speed.bytes_per_second
    return products + traffic + accounts.num_ops * speed.call_seconds


def speed_of(device: Device, dtype: Dtype) -> Speed | None:
    """The speed of a device in a dtype; None for one that is known by its size alone."""
    if device.name.partition(":")[0] in ("cpu", "cuda"):
        return calibrated(device.name, dtype)
    if not device.rate(dtype):
        return None
    return Speed(
        matrix_rate=REACHED_SHARE * device.rate(dtype),
        bytes_per_second=0.8 * device.bytes_per_second,
        call_seconds=0.0,  # the host runs ahead
        error_bar=0.6,
    )


def calibrated(device: str, dtype: Dtype) -> Speed:
    """The measured speed of the device that is here; from the cache where it was measured before.

    A measurement belongs to the machine, the torch version and the number of threads.
    """
    path = cache_folder() / "calibration.json"
    key = f"{_machine(device)} {dtype}"
    known = _read(path)
    if key in known:
        return Speed(**known[key])
    speed = _measure(torch.device(device), getattr(torch, dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(known | {key: asdict(speed)}, indent=1))
    return speed


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What was measured before; nothing where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _measure(device: torch.device, dtype: torch.dtype) -> Speed:
    with torch.no_grad():
        a = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
        b = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        small = torch.ones(8, device=device)
        product = _seconds_each(lambda: a @ b, device)
        copy = _seconds_each(lambda: target.copy_(source), device)
        call = _seconds_each(lambda: small + small, device)
    return Speed(2 * _SIDE**3 / product, 2 * _COPY_BYTES / copy, call, error_bar=0.5)


def _seconds_each(call: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a call, over about two seconds of them."""
    call()
    _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _CALIBRATION_SECONDS / 3:
        for _ in range(4):
            call()
        _wait(device)
        count += 4
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
