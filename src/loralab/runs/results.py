"""What the runs of a comparison wrote -> the evidence room's values, and back as plain data."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loralab.config import RunConfig
from loralab.data import Example
from loralab.evidence import (
    MethodResult,
    RatePoint,
    SeedPredictions,
    TestSet,
    build_comparison,
)
from loralab.runs.folder import Run
from loralab.runs.workbench import Workbench

if TYPE_CHECKING:
    from loralab.runs.compare import Entrant

CURVE_POINTS = 400
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


def comparison_of(
    config: RunConfig, bench: Workbench, entrants: "Sequence[Entrant]"
) -> dict[str, Any]:
    """comparison.json's content from the entrants' runs."""
    parameters = min(entrant.runs[0].manifest["base_parameters"] for entrant in entrants)
    comparison = build_comparison(
        [_result(entrant) for entrant in entrants],
        _test_set(config, bench, entrants[0].runs[0]),
        data_facts=bench.facts,
        settings=config.model_dump(exclude_none=True),
        base_bytes=parameters * BYTES_PER_PARAMETER[config.model.dtype],
        storage_tasks=config.compare.storage_tasks,
    )
    texts = {example.id: example for example in bench.dataset.test}
    for row in comparison["disagreements"]:
        row["text"] = _text(texts[row["id"]])
    first = entrants[0].runs[0].manifest
    return comparison | {
        "order_hash": first["order_hash"],
        "machine": first["machine"],
        "versions": first["versions"],
    }


def loss_curves(entrants: "Sequence[Entrant]") -> dict[str, list[dict[str, Any]]]:
    """Training and validation losses of every run, by method, for the report."""
    return {entrant.method: [_curve(run) for run in _all_runs(entrant)] for entrant in entrants}


def _all_runs(entrant: "Entrant") -> list[Run]:
    return list({run.folder: run for run in (*entrant.tried, *entrant.runs)}.values())


def _result(entrant: "Entrant") -> MethodResult:
    first = entrant.runs[0].manifest
    tried = {run.config.training.learning_rate: run for run in entrant.tried}
    return MethodResult(
        method=entrant.method,
        trainable_parameters=first["trainable_parameters"],
        total_parameters=first["total_parameters"],
        rates=tuple(
            _rate_point(rate, tried[rate]) for rate in entrant.sweep.losses if rate in tried
        ),
        best_learning_rate=entrant.sweep.best_rate,
        bracketed=entrant.sweep.bracketed,
        seeds=tuple(_seed_predictions(run) for run in entrant.runs),
        peak_bytes=entrant.solo["peak_bytes"],
        step_seconds=entrant.solo["step_seconds"],
        artifact_bytes=first["artifact_bytes"],
        artifact_needs_base=first["artifact"] != "model",
        steps=first["steps_done"],
        diverged_rates=tuple(
            rate for rate, loss in entrant.sweep.losses.items() if not math.isfinite(loss)
        ),
    )


def _rate_point(rate: float, run: Run) -> RatePoint:
    best = run.manifest["best"]
    return RatePoint(rate, best["nll"], best["accuracy"], run.folder.name)


def _seed_predictions(run: Run) -> SeedPredictions:
    rows = run.predictions("test")
    if run.config.model.task == "causal":
        answers = [int(row["exact"]) for row in rows]
        nll = [row["nll"] / max(1, row["target_tokens"]) for row in rows]
    else:
        answers = [row["prediction"] for row in rows]
        nll = [row["nll"] for row in rows]
    return SeedPredictions(run.config.training.seed, np.array(answers), np.array(nll))


def _test_set(config: RunConfig, bench: Workbench, run: Run) -> TestSet:
    rows = run.predictions("test")
    classifies = config.model.task == "classification"
    return TestSet(
        ids=tuple(row["id"] for row in rows),
        groups=tuple(row["group"] for row in rows),
        labels=np.array([row["label"] for row in rows]) if classifies else None,
        label_names=bench.dataset.label_names if classifies else None,
    )


def _curve(run: Run) -> dict[str, Any]:
    rows = run.rows_of("metrics.jsonl")
    train = [[row["step"], row["loss"]] for row in rows if "loss" in row]
    every = max(1, len(train) // CURVE_POINTS)
    return {
        "run": run.folder.name,
        "learning_rate": run.config.training.learning_rate,
        "seed": run.config.training.seed,
        "train": train[::every],
        "validation": [
            [row["step"], row["validation_nll"]] for row in rows if "validation_nll" in row
        ],
    }


def _text(example: Example) -> str:
    if example.messages is not None:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in example.messages)
    return example.text or f"{example.prompt or ''}{example.completion or ''}"
