"""What a GPU's data sheet allows a training step to take, without a GPU: no measurement.

The step is traced with fake tensors; each operation costs its arithmetic or its memory traffic at
what such GPUs reach of their peaks, whichever is more, and a launch at least. Arms are those of
training.py: own (dropout 0.1), own_without_kernels, peft (default), peft_best (adapters in the
base's dtype, no dropout), full. Blocks repeat: models with two and with four tell the rest.

    python benchmarks/roofline.py --json
    python benchmarks/roofline.py --json --device a10 --dtype float32 --model llama-3.2-1b
"""

import argparse
import json
import os
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from loralab.config import RunConfig
from loralab.native import on_gpu
from loralab.placement import planned_for
from loralab.planning import DEVICES, find_device
from loralab.planning.blocks import places_of
from loralab.planning.devices import Device
from loralab.planning.facts import rules_for
from loralab.planning.steps import rows_for, traceable
from loralab.planning.trace import Tracer

REACHED_RATE, REACHED_BANDWIDTH = 0.66, 0.8
"""Of the data sheet's figures, by large matrix products and by copies."""
LAUNCH_SECONDS = 3e-6
FEW_BLOCKS, MORE_BLOCKS = 2, 4

ARMS: dict[str, dict[str, Any]] = {
    "own": {"step": "own"},
    "own_without_kernels": {"step": "own"},
    "peft": {"step": "peft"},
    "peft_best": {"step": "peft", "dropout": 0.0},
    "full": {"step": "peft", "method": "full"},
}
RATIOS = {
    "step_vs_full": ("own", "full"),
    "step_vs_peft": ("own", "peft"),
    "step_vs_peft_best": ("own", "peft_best"),
    "step_vs_itself_without_kernels": ("own", "own_without_kernels"),
}

OVERWRITES = ("copy_", "fill_", "zero_")
GATHERS = ("index_select", "embedding")


class TimedTracer(Tracer):
    """Adds up the seconds of operations by kind: products, kernels of our own, the rest."""

    def __init__(self, device: Device) -> None:
        super().__init__(rules_for(device))
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._flops
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        if not _moves(name, given, made):
            return result
        num_bytes = _traffic(name, given, made)
        dtype = next((str(t.dtype) for t in given if t.is_floating_point()), "torch.float32")
        rate = self._device.rate(dtype.removeprefix("torch."))
        arithmetic = (self._flops - before) / (REACHED_RATE * rate)
        moving = self._moving(num_bytes)
        is_product = self._flops > before
        kind = (
            "other" if not is_product else "products" if arithmetic >= moving else "thin products"
        )
        self._add_up(kind, max(arithmetic, moving))
        return result

    def run_kernel(self, name: str, _grid: Any, *given: Any, **constants: Any) -> None:
        """In the place of a kernel of our own: it reads or writes every tensor once."""
        tensors = [t for t in given if isinstance(t, Tensor) and t.dtype != torch.uint8]
        num_bytes = sum(_size(t) for t in {id(t): t for t in tensors}.values())
        if name == "expand" and constants["ADDED"]:
            num_bytes += _size(given[2])
        if name == "gated_backward":
            num_bytes += _size(given[0])  # its memory is written again
        self._add_up("own kernels", self._moving(num_bytes))

    def _moving(self, num_bytes: int) -> float:
        return num_bytes / (REACHED_BANDWIDTH * self._device.bytes_per_second)

    def _add_up(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += max(seconds, LAUNCH_SECONDS)
        self.launches += 1


def main() -> None:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    runs = {name: step_seconds(name, arguments) for name in ARMS}
    ratios = {
        name: round(runs[own]["seconds"] / runs[other]["seconds"], 3)
        for name, (own, other) in RATIOS.items()
    }
    found = {"ratios": ratios, "runs": runs, "device": arguments.device, "measured": False}
    print(json.dumps(found, indent=None if arguments.json else 2))


def step_seconds(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arm's step on a whole model."""
    os.environ["LORALAB_KERNELS"] = "off" if arm == "own_without_kernels" else "on"
    few, depth = traced(arm, arguments, FEW_BLOCKS)
    more, _ = traced(arm, arguments, MORE_BLOCKS)
    times = (depth - FEW_BLOCKS) / (MORE_BLOCKS - FEW_BLOCKS)
    parts = {
        kind: few.seconds[kind] + times * (more.seconds[kind] - few.seconds[kind])
        for kind in more.seconds
    }
    launches = few.launches + times * (more.launches - few.launches)
    return {"seconds": sum(parts.values()), "parts": parts, "launches": round(launches)}


def traced(arm: str, arguments: argparse.Namespace, num_blocks: int) -> tuple[TimedTracer, int]:
    """A step of the model with so many blocks, and how many it has."""
    settings, device = ARMS[arm], find_device(arguments.device)
    config = RunConfig.model_validate(
        {
            "model": {"name": arguments.model, "task": "classification", "dtype": arguments.dtype},
            "method": {
                "kind": settings.get("method", "lora"),
                "rank": 16,
                "alpha": 32,
                "dropout": settings.get("dropout", 0.1),
            },
            "data": {"name": "movie-reviews", "max_tokens": arguments.tokens},
            "training": {"batch_size": arguments.rows},
        }
    )
    tracer = TimedTracer(device)
    on_gpu._run = tracer.run_kernel
    with planned_for(device.type):
        source = traceable(config, settings["step"])
        if arm == "peft_best":
            for parameter in source.model.parameters():
                parameter.data = parameter.data.to(getattr(torch, arguments.dtype))
        runs = [run.keeping(num_blocks) for run in source.runs]
        ready = source.ready(tracer, runs, config, rows_for(config))
        with tracer.world(places_of(ready.model, runs)):
            ready.before()
            ready.step()
            tracer.seconds.clear()
            tracer.launches = 0
            ready.step()
    return tracer, sum(run.length for run in source.runs)


def _moves(name: str, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operation on large tensors moves memory: it makes no views, and not only room."""
    if not any(isinstance(t, FakeTensor) for t in made) or "empty" in name:
        return False
    known = {tensor.untyped_storage()._cdata for tensor in given}
    return name.endswith("_") or any(t.untyped_storage()._cdata not in known for t in made)


def _traffic(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    read = given[1:] if name in OVERWRITES else given
    num_bytes = sum(_size(t) for t in {id(t): t for t in (*read, *made)}.values())
    if name in GATHERS:  # as much as it writes, of a table that may be large
        num_bytes = 2 * sum(map(_size, made))
    is_in_place = name.endswith("_") and name not in OVERWRITES and not name.startswith("_")
    return num_bytes + (sum(map(_size, made)) if is_in_place else 0)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor, what is expanded once."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    repeats = [size for size, step in steps if step == 0 and size > 1]
    count = tensor.numel()
    for size in repeats:
        count //= size
    return count * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
