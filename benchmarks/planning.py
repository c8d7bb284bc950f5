"""Plans against real steps: peak memory predicted from settings, and measured with random weights.

    python benchmarks/planning.py --json                     # 16 settings on the CPU
    python benchmarks/planning.py --times --json             # seconds a step, on one thread
    python benchmarks/planning.py --device cuda --json       # 24 settings on the GPU that is here
    python benchmarks/planning.py --device cuda --seed-cap   # foreach against fused under 22.07 GiB
    python benchmarks/planning.py --device h100 --plans      # the same settings planned, none run

Each setting runs in a fresh process. On CUDA the measure is `torch.cuda.max_memory_allocated`, on
the CPU the allocator's own accounting.
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
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

# Small models of families and settings that no other case has.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 96,
        "vocab_size": 20_000,
        "tie_word_embeddings": True,
    },
    "minilm": {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "vocab_size": 30_522,
    },
    "phi3": {
        "model_type": "phi3",
        "hidden_size": 448,
        "intermediate_size": 1200,
        "num_hidden_layers": 10,
        "num_attention_heads": 7,
        "num_key_value_heads": 7,
        "vocab_size": 32_064,
        "pad_token_id": 0,
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8_000,
        "sliding_window": 128,
    },
}

BLIND_SETTINGS: list[Setting] = [
    ("qwen3", "own", at(3, 300, CAUSAL, BF16, {"method.dora": True})),
    ("phi3", "peft", at(5, 300, CHECKPOINTED)),
    ("mistral", "own", at(2, 300, CAUSAL, CHECKPOINTED, {"method.rank": 64})),
    ("mistral", "peft", at(6, 77, CAUSAL, {"training.accumulation": 3})),
]

THREAD = {"training.threads": 1}
TIMED_SETTINGS: list[Setting] = [
    ("smollm2-135m", "own", at(16, 40, THREAD)),
    ("smollm2-135m", "own", at(16, 40, BF16, THREAD)),
    ("smollm2-135m", "own", at(8, 40, FULL, THREAD)),
    ("minilm", "own", at(16, 128, THREAD)),
    ("minilm", "own", at(16, 64, FULL, THREAD)),
    ("mistral", "own", at(4, 128, CAUSAL, THREAD)),
    ("qwen3", "peft", at(4, 128, BF16, THREAD)),
    ("phi3", "own", at(4, 64, FULL, CAUSAL, THREAD)),
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
        "model": {"name": _written(model) if model in FAMILIES else model},
        "data": {"name": "no rows are read"},
        "method": {"dropout": 0.1},
        "training": {},
    }
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        tables[section][key] = value
    return parse_config(tables)


@functools.cache
def _written(family: str) -> str:
    """The path of a family's small configuration."""
    path = Path(tempfile.mkdtemp(prefix="loralab-plans-")) / "config.json"
    path.write_text(json.dumps(FAMILIES[family]), encoding="utf-8")
    return str(path)


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
        "predicted_seconds": found.predicted_seconds,
    }


def planned(setting: Setting, device: str) -> dict[str, Any]:
    """The plan of a setting alone: that it can be traced, and what it says."""
    model, step, changes = setting
    made = Planner(find_device(device), step).plan(config_of(model, changes))
    row: dict[str, Any] = {"model": model, "step": step, **changes}
    return row | {
        "predicted_bytes": made.peak_bytes,
        "fits": made.fits,
        "phase": made.phase,
        "estimated": made.estimated or None,
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
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; with --plans any that `loralab plan` knows"
    )
    parser.add_argument("--times", action="store_true", help="seconds a step, one thread")
    parser.add_argument("--plans", action="store_true", help="plan the GPU's settings, run none")
    parser.add_argument(
        "--seed-cap", action="store_true", help="only the seed's out-of-memory check"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if chosen.seed_cap:
        print(json.dumps(seed_cap(), indent=1))
        return
    if chosen.plans:
        for setting in GPU_SETTINGS:
            print(json.dumps(planned(setting, chosen.device)), flush=True)
        return
    if chosen.device not in ("cpu", "cuda"):
        parser.error("what is run is run here: --device cpu or cuda")
    cases = [*CPU_SETTINGS, *BLIND_SETTINGS] if chosen.device == "cpu" else GPU_SETTINGS
    rows = []
    for setting in TIMED_SETTINGS if chosen.times else cases:
        rows.append(check(setting, chosen.device))
        if not chosen.json:
            print(rows[-1], flush=True)
    if chosen.times:
        print(json.dumps(times(rows), indent=1))
        return
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


def times(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the estimate of a step's seconds is off by, relative to what was measured."""
    for row in rows:
        row["time_error"] = row["predicted_seconds"] / row["step_seconds"] - 1
    errors = [abs(row["time_error"]) for row in rows]
    return {"rows": rows, "worst_error": max(errors), "mean_error": mean(errors)}


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
