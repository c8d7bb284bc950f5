"""`kill -9` at any moment, then resume: the bytes of a run that was never interrupted."""

import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import labelled_rows, llama, ready

from loralab.training import fit, predict

SECONDS_A_RUN = 60


def train(folder: Path, kind: str) -> None:
    """In a process of its own: a whole run (or the rest of one), then weights and predictions."""
    torch.set_num_threads(1)
    trainable = ready(
        kind,
        model=llama(dropout=0.1, dtype="bfloat16"),
        method={"dropout": 0.1},
        epochs=3,
        evaluations_per_epoch=2,
        checkpoint_steps=2,
    )
    validation = labelled_rows(12, seed=1)
    for _ in fit(trainable, labelled_rows(40), validation, folder):
        pass
    predictions = predict(trainable.model, validation, task="classification", route=trainable.route)
    (folder / "predictions.json").write_text(json.dumps([vars(p) for p in predictions]))
    save_file(trainable.parameters, folder / "weights.safetensors")


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Processes that start at once, since their server has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loralab.training", "transformers.models.llama.modeling_llama"])
    yield context


def start(processes: ForkServerContext, folder: Path, kind: str) -> ForkServerProcess:
    process = processes.Process(target=train, args=(folder, kind))
    process.start()
    return process


def results(folder: Path) -> dict[str, bytes]:
    names = ("weights.safetensors", "metrics.jsonl", "predictions.json")
    return {name: (folder / name).read_bytes() for name in names}


def check(processes: ForkServerContext, folder: Path, kind: str, kills: int) -> None:
    """A run killed at `kills` random moments equals one that was left alone."""
    whole = start(processes, folder / "whole", kind)
    while not (folder / "whole" / "metrics.jsonl").exists() and whole.is_alive():
        time.sleep(0.001)
    began = time.monotonic()
    whole.join(SECONDS_A_RUN)
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    draw = random.Random(kills)
    killed = 0
    for _ in range(kills):
        process = start(processes, folder / "parts", kind)
        while not (folder / "parts" / "metrics.jsonl").exists() and process.is_alive():
            time.sleep(0.001)
        process.join(duration * draw.uniform(0.0, 2.0) / kills)
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed, "every run ended before it was killed"
    last = start(processes, folder / "parts", kind)
    last.join(SECONDS_A_RUN)
    assert last.exitcode == 0
    assert results(folder / "whole") == results(folder / "parts")


def test_killed_three_times(processes: ForkServerContext, tmp_path: Path) -> None:
    check(processes, tmp_path, "lora", kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full", "frozen"])
def test_killed_twenty_times(processes: ForkServerContext, tmp_path: Path, kind: str) -> None:
    check(processes, tmp_path, kind, kills=20)
