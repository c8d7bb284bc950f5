"""The X-ray of a whole adapter: seconds with and without its base, and how exact it is.

SmolLM2-135M, rank 16 on all linear layers (210 modules), a random adapter with a falling spectrum.

    python benchmarks/xray.py --json
    python benchmarks/xray.py --random --json      # no download: weights of that shape

Meaning of the figures:
read_seconds: the adapter's folder into a value, checksums included.
without_base_seconds, with_base_seconds: every figure of every module; with the base also relative
    size, amplification, intruder dimensions and their onset. cpu: what one idle core would take.
against_seconds: without base, and the overlap with a second adapter of the same size.
dense_seconds: `torch.linalg.svdvals` of the multiplied-out deltas of one block, times the blocks.
largest_relative_error: of a singular value against that dense SVD in fp64, over its largest.
intruders_missed, intruders_too_many: over planted cases of three shapes and two spectra.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters import (
    Adapter,
    LoRAConfig,
    adapter_parameters,
    attach,
    extract,
    read_adapter,
    write_adapter,
)
from loralab.evidence.xray import Weights, xray
from loralab.lowrank import Dense, Factors, delta, factored_svd, intrusion
from loralab.models import StoredWeights, build_model, load_model

RANK, BLOCKS = 16, 30


class RandomWeights:
    """A model's parameters in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, parameter: str) -> Tensor | None:
        return self.tensors.get(parameter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", action="store_true", help="weights of that shape, no download")
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    adapter, weights = _subject(arguments.random)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(adapter, weights, Path(folder) / "adapter")
    result |= planted()
    result["conditions"] = {
        "model": "random weights" if arguments.random else "smollm2",
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "scipy")},
    }
    print(json.dumps(result, indent=None if arguments.json else 2))


def measure(adapter: Adapter, weights: Weights, folder: Path) -> dict[str, Any]:
    """Seconds, and the error against dense SVDs."""
    write_adapter(adapter, folder)
    read_seconds, adapter = _timed(lambda: read_adapter(folder))
    without, found = _timed(lambda: xray(adapter))
    against, _ = _timed(lambda: xray(adapter, against={"itself": adapter}))
    started = time.process_time()
    with_base, _ = _timed(lambda: xray(adapter, weights=weights))
    cpu_seconds = time.process_time() - started
    block = [module for module in found.modules if module.block == 0]
    deltas = {m.module: delta(adapter.factors(m.module)) for m in block}
    dense, _ = _timed(lambda: [torch.linalg.svdvals(matrix) for matrix in deltas.values()])
    errors = []
    for module in block:
        exact = torch.linalg.svdvals(deltas[module.module].double())[:RANK]
        values = torch.tensor(module.singular_values, dtype=torch.float64)
        errors.append(float((values - exact).abs().max() / exact[0]))
    return {
        "modules": len(found.modules),
        "read_seconds": read_seconds,
        "without_base_seconds": without,
        "against_seconds": against,
        "with_base_seconds": with_base,
        "with_base_cpu_seconds": cpu_seconds,
        "dense_seconds": dense * BLOCKS,
        "largest_relative_error": max(errors),
    }


def planted() -> dict[str, int]:
    """Deltas with known intruders, strengthened directions of the base, and noise."""
    missed = too_many = cases = 0
    for shape in ((256, 256), (384, 128), (128, 384)):
        for decay in (False, True):
            for count in (0, 1, 2, 5):
                seen, strongest = _plant(shape, decay, count, seed=cases)
                missed += count - strongest
                too_many += seen - strongest
                cases += 1
    return {"intruder_cases": cases, "intruders_missed": missed, "intruders_too_many": too_many}


def _plant(shape: tuple[int, int], decay: bool, count: int, seed: int) -> tuple[int, int]:
    """(intruders found, planted ones among them: they are the strongest directions)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    if decay:
        U, S, Vh = torch.linalg.svd(base, full_matrices=False)
        base = U * (8 * torch.arange(1, len(S) + 1) ** -0.4) @ Vh
    svd = Dense(base).svd()
    left, right = (torch.linalg.qr(torch.randn(n, 9, generator=generator)).Q for n in shape)
    sizes = torch.cat([torch.full((count,), 2.0), torch.full((4,), 0.01)]) * svd.S[0]
    known = [2, 5, 7]
    B = torch.cat([svd.U[:, known] * 0.4 * svd.S[0], left[:, : count + 4] * sizes], dim=1)
    pair = Factors(A=torch.cat([svd.Vh[known], right[:, : count + 4].mT]), B=B)
    found = intrusion(Dense(base), base + delta(pair), factored_svd(pair).U).intruders
    return int(found.sum()), int(found[:count].sum())


def _subject(random: bool) -> tuple[Adapter, Weights]:
    if random:
        model = build_model("smollm2-135m", task="causal", device="cpu")
        weights: Weights = RandomWeights({n: p.detach() for n, p in model.named_parameters()})
    else:
        model, weights = load_model("smollm2", task="causal"), StoredWeights("smollm2")
    attach(model, LoRAConfig(rank=RANK, alpha=2 * RANK), name="it", seed=0)
    generator = torch.Generator().manual_seed(1)
    falling = torch.logspace(0, -2, RANK)
    for name, parameter in adapter_parameters(model, "it").items():
        if name.endswith(".B"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.02 * noise * falling
    return extract(model, "it"), weights


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
