"""Does the rank that `loralab rank` chooses hold on rows that had no part in choosing?

    python benchmarks/rank.py --json --repeats 40 --output rank-repeats

Each repeat draws its own training, choosing and fresh rows from movie-reviews, trains MiniLM at
rank 16 with its own seed, chooses the smallest rank within the tolerance on the choosing rows,
and looks at the loss on the fresh ones. A repeat that is already in the folder is not run again.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loralab.config import DataSection, RunConfig, parse_config
from loralab.data import Example, load_dataset
from loralab.files import write_json
from loralab.runs.rank import rank
from loralab.runs.train import train

TRAIN, CHOOSE, FRESH = 256, 200, 300
HIGH, RANKS = 16, (8, 4, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("rank-repeats"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = DataSection(name="movie-reviews")
    dataset = load_dataset(data, task="classification", num_labels=2)
    pool = [*dataset.train, *dataset.validation, *dataset.test]
    repeats = []
    for seed in range(arguments.repeats):
        place = arguments.output / f"repeat-{seed:02d}.json"
        if not place.is_file():
            write_json(place, repeat(pool, seed, arguments))
        repeats.append(json.loads(place.read_text(encoding="utf-8")))
        sys.stderr.write(f"repeat {seed}: {repeats[-1]}\n")
    document = summary(repeats, arguments.tolerance)
    print(json.dumps(document, indent=None if arguments.json else 2))


def repeat(pool: Sequence[Example], seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training and one choice."""
    order = np.random.default_rng(seed).permutation(len(pool))
    parts = np.split(order, np.cumsum([TRAIN, CHOOSE, FRESH]))[:3]
    with tempfile.TemporaryDirectory(prefix="loralab-rank-") as name:
        folder = Path(name)
        for split, part in zip(("train", "validation", "test"), parts, strict=True):
            write_rows(folder / f"{split}.csv", [pool[index] for index in part])
        run = train(settings(folder, seed, arguments), folder / "run", splits=())
        found = rank(run.folder, tolerance=arguments.tolerance, rules=("uniform",), ranks=RANKS)
    chosen, full = found["chosen"], found["full"]
    return {
        "seed": seed,
        "rank": chosen["rank"] if chosen else full["rank"],
        "truncated": chosen is not None,
        "within": chosen["confirm"]["within"] if chosen else True,
        "bound": chosen["lost_nll"]["upper"] if chosen else 0.0,
        "lost_on_fresh": chosen["confirm"]["lost_nll"]["mean"] if chosen else 0.0,
        "fresh_low": chosen["confirm"]["lost_nll"]["low"] if chosen else 0.0,
        "accuracy": full["accuracy"],
        "curve": {row["rank"]: row["lost_nll"]["mean"] for row in found["curve"]},
    }


def settings(folder: Path, seed: int, arguments: argparse.Namespace) -> RunConfig:
    """A short training at a high rank, the rate being MiniLM's best of a few on these rows."""
    return parse_config(
        {
            "model": {"name": "minilm", "pooling": "mean", "dropout": 0.0},
            "data": {
                split: str(folder / f"{split}.csv") for split in ("train", "validation", "test")
            }
            | {"max_tokens": 48},
            "method": {"rank": HIGH, "alpha": 2.0 * HIGH},
            "training": {
                "learning_rate": arguments.rate,
                "epochs": arguments.epochs,
                "batch_size": 8,
                "seed": seed,
                "warmup": 0.1,
                "threads": arguments.threads,
                "device": "cpu",
                "memory_plan": "off",
                "checkpoint_steps": 1000,
            },
        }
    )


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    """A CSV file with text and label."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([row.text, row.label] for row in rows)


def summary(repeats: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """How often the choice held, and what was chosen."""
    lost = [row["lost_on_fresh"] for row in repeats]
    return {
        "repeats": len(repeats),
        "tolerance": tolerance,
        "within": sum(row["within"] for row in repeats),
        "shown_to_exceed": sum(row["fresh_low"] > tolerance for row in repeats),
        "chosen_ranks": dict(sorted(Counter(str(row["rank"]) for row in repeats).items())),
        "truncated": sum(row["truncated"] for row in repeats),
        "median_lost_on_fresh": float(np.median(lost)),
        "largest_lost_on_fresh": float(np.max(lost)),
    }


if __name__ == "__main__":
    main()
