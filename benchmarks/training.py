"""A training step against PEFT's and against full fine-tuning, in one interleaved run.

SmolLM2-135M as a classifier, 16 rows of 40 tokens, rank 16 on all linear layers, bf16. All arms
take turns on the same batch, so that what else the machine does hits all; figures are medians.

    python benchmarks/training.py --json
    python benchmarks/training.py --json --arms full own --rounds 5
    python benchmarks/training.py --json --end-to-end       # a whole epoch against Trainer + PEFT
    python benchmarks/training.py --json --device cuda --model llama-3.2-1b --tokens 256

A preset's name (as `loralab plan` knows them) is a model with random weights: neither time nor
memory depends on them. LORALAB_KERNELS=off runs our arms on torch's operations.

Arms: full (plain transformers, AdamW), own (this project's whole step, dropout 0.1), own_full (its
full fine-tuning), peft (default settings, the same dropout), peft_best (bf16 adapters, no dropout),
own_dora and peft_dora, own_causal and peft_causal (a quarter of the tokens are completion).
cpu_seconds count both threads and are steadier than seconds on a machine that others use too.
saved_bytes: activations kept for the backward pass, each storage once, without parameters.
floor: LoRA's share of full fine-tuning's matrix work, (2 + 3 rho) / 3.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralab.config import MethodSection, Task, TrainingSection
from loralab.data import Encoded
from loralab.measuring import peak_live_bytes
from loralab.models import PRESETS, build_model, load_model
from loralab.native import products, training as native
from loralab.training import prepare, repeatable_step
from training_epoch import measure_epochs

RANK, ALPHA, DROPOUT = 16, 32, 0.1
COMPLETION = 0.25
ARMS = ["full", "own", "own_full", "peft", "peft_best"]
ARMS += ["own_dora", "peft_dora", "own_causal", "peft_causal"]
RATIOS = {
    "step_vs_full": ("own", "full"),
    "step_vs_own_full": ("own", "own_full"),
    "step_vs_peft": ("own", "peft"),
    "step_vs_peft_best": ("own", "peft_best"),
    "dora_vs_peft": ("own_dora", "peft_dora"),
    "causal_vs_peft": ("own_causal", "peft_causal"),
}
SAVED = {"saved_vs_peft": ("own", "peft"), "saved_vs_full": ("own", "full")}


@dataclass
class Arm:
    """One way to train: a whole step, and its figures."""

    step: Callable[[], object]
    parameters: frozenset[int]  # storages that are no activations
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    found = measure_epochs(arguments) if arguments.end_to_end else measure(arguments)
    found["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "device": arguments.device,
        "threads": arguments.threads,
        "kernels": native.build_name(torch.device(arguments.device)),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
    }
    print(json.dumps(found, indent=None if arguments.json else 2))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All arms in turns: a warm-up round, then `--rounds`."""
    arms = {name: build(name, arguments) for name in arguments.arms}
    if products.are_widened(getattr(torch, arguments.dtype), torch.device(arguments.device)):
        _say(f"no instructions for {arguments.dtype} here: other arms are slow; see --dtype")
    for turn in range(arguments.rounds + 1):
        began = time.perf_counter()
        for arm in arms.values():
            _synchronise(arguments.device)
            wall, cpu = time.perf_counter(), time.process_time()
            arm.step()
            _synchronise(arguments.device)
            if turn:
                arm.seconds.append(time.perf_counter() - wall)
                arm.cpu_seconds.append(time.process_time() - cpu)
        left = (time.perf_counter() - began) * (arguments.rounds - turn)
        _say(f"round {turn} of {arguments.rounds}, about {left / 60:.0f} minutes left")
    tokens = arguments.rows * arguments.tokens
    runs = [_figures(name, arm, tokens, arguments) for name, arm in arms.items()]
    by_name = {run["arm"]: run for run in runs}
    ratios = _ratios(by_name, RATIOS, "step_seconds") | _ratios(by_name, SAVED, "saved_bytes")
    cpu = _ratios(by_name, RATIOS, "cpu_seconds")
    return {"ratios": ratios, "cpu_ratios": cpu, "floor": _floor(arguments), "runs": runs}


def build(name: str, arguments: argparse.Namespace) -> Arm:
    """The arm of that name with a model of its own."""
    task: Task = "causal" if name.endswith("causal") else "classification"
    model = _model(arguments, task)
    rows = _rows(arguments, task)
    if name.startswith("own"):
        return _own(name, model, rows, task, arguments)
    model.to(arguments.device)
    trained: Any = model.requires_grad_(True) if name == "full" else _peft(name, model, task)
    return _plain(trained.train(), rows, arguments)


def _own(
    name: str, model: nn.Module, rows: list[Encoded], task: Task, arguments: argparse.Namespace
) -> Arm:
    kind = "full" if name == "own_full" else "lora"
    method = MethodSection(
        kind=kind, rank=RANK, alpha=ALPHA, dropout=DROPOUT, dora=name == "own_dora"
    )
    training = TrainingSection(
        learning_rate=1e-4,
        batch_size=arguments.rows,
        device=arguments.device,
        threads=arguments.threads,
        master_weights=name != "own_full",  # as the plain arm trains
    )
    trainable = prepare(model, method, training, task=task)
    return Arm(repeatable_step(trainable, rows), _storages(model))


def _peft(name: str, model: nn.Module, task: Task) -> nn.Module:
    best = name == "peft_best"
    head: dict[str, Any] = {"modules_to_save": ["score"], "exclude_modules": ["score"]}
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0 if best else DROPOUT,
        use_dora=name == "peft_dora",
        target_modules="all-linear",
        task_type="CAUSAL_LM" if task == "causal" else "SEQ_CLS",
        **(head if task == "classification" else {}),
    )
    wrapped: Any = model  # PEFT's stub asks for a PreTrainedModel
    return get_peft_model(wrapped, config, autocast_adapter_dtype=not best)


def _plain(model: nn.Module, rows: list[Encoded], arguments: argparse.Namespace) -> Arm:
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.tensor([row.input_ids for row in rows], device=arguments.device)
    wanted = [row.label if row.targets is None else row.targets for row in rows]
    labels = torch.tensor(wanted, device=arguments.device)

    def step() -> None:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()

    return Arm(step, _storages(model))


def _model(arguments: argparse.Namespace, task: Task) -> PreTrainedModel:
    if arguments.model in PRESETS:
        device = arguments.device
        return build_model(arguments.model, task=task, dtype=arguments.dtype, device=device)
    return load_model(arguments.model, task=task, dtype=arguments.dtype)


def _rows(arguments: argparse.Namespace, task: Task) -> list[Encoded]:
    torch.manual_seed(0)
    prompt = round(arguments.tokens * (1 - COMPLETION))
    rows = []
    for index in range(arguments.rows):
        ids = torch.randint(5, 30_000, (arguments.tokens,)).tolist()
        targets = None if task == "classification" else (*[-100] * prompt, *ids[prompt:])
        label = index % 2 if targets is None else None
        row = Encoded(
            id=str(index), group=str(index), input_ids=tuple(ids), label=label, targets=targets
        )
        rows.append(row)
    return rows


def _figures(name: str, arm: Arm, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    seconds = statistics.median(arm.seconds)
    return {
        "arm": name,
        "step_seconds": seconds,
        "cpu_seconds": statistics.median(arm.cpu_seconds),
        "tokens_per_second": tokens / seconds,
        "saved_bytes": _saved_bytes(arm),
        "peak_bytes": peak_live_bytes(arm.step, device=arguments.device, warmup=0)
        if arguments.device != "cpu"
        else None,  # on the CPU all arms live in this process
        "rounds": len(arm.seconds),
    }


def _saved_bytes(arm: Arm) -> int:
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in arm.parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no storage is counted under another's address
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        arm.step()
    return sum(storages.values())


def _storages(model: nn.Module) -> frozenset[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def _ratios(
    runs: dict[str, dict[str, Any]], wanted: dict[str, tuple[str, str]], figure: str
) -> dict[str, float]:
    return {
        name: round(runs[own][figure] / runs[other][figure], 3)
        for name, (own, other) in wanted.items()
        if own in runs and other in runs
    }


def _floor(arguments: argparse.Namespace) -> float:
    """(2 + 3 rho) / 3, rho = adapter parameters / weights of the adapted layers."""
    model = _model(arguments, "classification")
    linears = [
        m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n not in ("score", "lm_head")
    ]
    weights = sum(m.weight.numel() for m in linears)
    pairs = sum(RANK * sum(m.weight.shape) for m in linears)
    return round((2 + 3 * pairs / weights) / 3, 4)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--end-to-end", action="store_true", help="an epoch against Trainer")
    parser.add_argument("--epoch-rows", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
