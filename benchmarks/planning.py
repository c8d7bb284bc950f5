"""Plans against real steps: peak memory predicted from settings, and measured with random weights.

    python benchmarks/planning.py --json                     # 12 settings on the CPU
    python benchmarks/planning.py --device cuda --json       # 24 settings on the GPU that is here
    python benchmarks/planning.py --device cuda --seed-cap   # foreach against fused under 22.07 GiB

Each setting runs in a fresh process. On CUDA the measure is `torch.cuda.max_memory_allocated`, on
the CPU the allocator's own accounting.
"""

import argparse
import json
import platform
import subprocess
import sys
from statistics import mean
from typing import Any

import torch

from loralab.config import RunConfig, parse_config
from loralab.errors import LoralabError
from loralab.planning import Planner, StepKind, find_device, verify

Setting = tuple[str, StepKind, dict[str, Any]]

CAUSAL = {"model.task": "causal"}
BF16 = {"model.dtype": "bfloat16"}
CHECKPOINTED = {"training.activation_checkpointing": True}
FULL, FROZEN = {"method.kind": "full"}, {"method.kind": "frozen"}


def at(batch_size: int, tokens: int, *more: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a setting."""
    settings = {"training.batch_size": batch_size, "data.max_tokens": tokens}
    return {**settings, **{key: value for part in more for key, value in part.items()}}


CPU_SETTINGS: list[Setting] = [
    ("smollm2-135m", "own", at(4, 64)),
    ("smollm2-135m", "peft", at(4, 64)),
    ("smollm2-135m", "own", at(2, 128, CAUSAL, BF16)),
    ("smollm2-135m", "own", at(4, 128, CHECKPOINTED)),
    ("smollm2-135m", "peft", at(2, 96, FULL, {"training.fused": False})),
    ("smollm2-135m", "own", at(2, 96, FROZEN, CAUSAL)),
    ("bert-base", "own", at(8, 128)),
    ("bert-base", "peft", at(4, 200, FULL)),
    ("roberta-base", "own", at(4, 96, FROZEN, {"training.accumulation": 2})),
    ("gpt2", "own", at(2, 256, CAUSAL)),
    ("gpt2", "peft", at(2, 128, CAUSAL, FULL)),
    ("gemma-3-270m", "own", at(2, 64, CAUSAL)),
]

GPU_SETTINGS: list[Setting] = [
    ("llama-3.2-1b", "own", at(8, 256)),
    ("llama-3.2-1b", "peft", at(4, 512)),
    ("llama-3.2-1b", "own", at(2, 2048, CAUSAL, BF16)),
    ("llama-3.2-1b", "peft", at(1, 4096, CAUSAL, BF16)),
    ("llama-3.2-1b", "own", at(4, 1024, CAUSAL, BF16, CHECKPOINTED)),
    ("llama-3.2-1b", "own", at(2, 256, FULL)),
    ("llama-3.2-1b", "peft", at(8, 128, FULL, BF16)),
    ("llama-3.2-1b", "own", at(8, 256, FROZEN)),
    ("llama-3.2-3b", "own", at(2, 512, CAUSAL, BF16)),
    ("qwen2.5-0.5b", "own", at(8, 256, CAUSAL)),
    ("qwen2.5-0.5b", "peft", at(4, 1024, CAUSAL, BF16)),
    ("qwen2.5-0.5b", "own", at(4, 512, FULL, BF16, CAUSAL)),
    ("qwen3-1.7b", "own", at(2, 1024, BF16)),
    ("qwen3-0.6b", "peft", at(4, 256, CHECKPOINTED)),
    ("smollm2-360m", "own", at(16, 64)),
    ("smollm2-360m", "peft", at(2, 4096, CAUSAL, BF16)),
    ("smollm2-1.7b", "own", at(4, 256, FROZEN, BF16)),
    ("bert-large", "own", at(16, 384)),
    ("bert-large", "peft", at(16, 128, FULL)),
    ("roberta-base", "own", at(32, 256, BF16)),
    ("gpt2-medium", "own", at(4, 1024, CAUSAL)),
    ("gpt2-medium", "peft", at(8, 512, CAUSAL, BF16, FULL)),
    ("gemma-3-1b", "own", at(2, 512, CAUSAL, BF16)),
    ("mistral-7b", "own", at(1, 1024, CAUSAL, BF16)),
]

SEED_CAP_GIB = 22.07


def config_of(model: str, changes: dict[str, Any]) -> RunConfig:
    """The settings of a case: LoRA of rank 16 with dropout 0.1 unless changed."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": model},
        "data": {"name": "no rows are read"},
        "method": {"dropout": 0.1},
        "training": {},
    }
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        tables[section][key] = value
    return parse_config(tables)


def check(setting: Setting, device: str) -> dict[str, Any]:
    """One row of the table."""
    model, step, changes = setting
    row: dict[str, Any] = {"model": model, "step": step, **changes}
    try:
        found = verify(config_of(model, changes), step, device)
    except LoralabError as error:
        return row | {"failed": error.cause}
    return row | {
        "predicted_bytes": found.predicted_bytes,
        "measured_bytes": found.measured_bytes,
        "error": found.error,
        "step_seconds": found.step_seconds,
    }


_CAPPED = """
import sys, torch
from loralab.planning.verify import measure_here
sys.path.insert(0, "benchmarks"); from planning import SEED_CAP_GIB, config_of
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(SEED_CAP_GIB * 2**30 / total)
changes = {"method.kind": "full", "training.batch_size": 2, "data.max_tokens": 256,
           "training.fused": sys.argv[1] == "fused"}
print(measure_here(config_of("llama-3.2-1b", changes), "peft", "cuda")["measured_bytes"])
"""


def seed_cap() -> list[dict[str, Any]]:
    """Full fine-tuning at batch 2 under the seed's 22.07 GiB: with foreach, and fused."""
    rows = []
    for optimiser in ("foreach", "fused"):
        command = [sys.executable, "-c", _CAPPED, optimiser]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        said = (ran.stdout or ran.stderr).strip().splitlines()
        rows.append({"optimiser": optimiser, "fits": ran.returncode == 0, "said": said[-1:]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--seed-cap", action="store_true", help="only the seed's out-of-memory check"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if chosen.seed_cap:
        print(json.dumps(seed_cap(), indent=1))
        return
    rows = []
    for setting in CPU_SETTINGS if chosen.device == "cpu" else GPU_SETTINGS:
        rows.append(check(setting, chosen.device))
        if not chosen.json:
            print(rows[-1], flush=True)
    errors = [abs(row["error"]) for row in rows if "error" in row]
    document = {
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": rows,
        "worst_error": max(errors, default=None),
        "mean_error": mean(errors) if errors else None,
        "wrong_fits": wrong_fits(chosen.device, rows),
    }
    print(json.dumps(document, indent=1))


def wrong_fits(device: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings that the plan says fit and that ran out of memory."""
    present = find_device(device)
    failed = [row for row in rows if "out of memory" in str(row.get("failed", ""))]
    return [
        row
        for row in failed
        if Planner(present, row["step"])
        .plan(config_of(row["model"], {k: v for k, v in row.items() if "." in k}))
        .fits
    ]


if __name__ == "__main__":
    main()
