"""What the runs of a comparison wrote -> the evidence room's values, and back as plain data."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loralab.config import RunConfig
from loralab.data import Example
from loralab.errors import TrainingError
from loralab.evidence import (
    MethodResult,
    RatePoint,
    SeedPredictions,
    TestSet,
    build_comparison,
)
from loralab.runs.folder import ARTIFACT_OF, Run
from loralab.runs.workbench import Workbench

if TYPE_CHECKING:
    from loralab.runs.compare import Entrant

CURVE_POINTS = 400
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


def comparison_of(
    config: RunConfig, bench: Workbench, entrants: "Sequence[Entrant]"
) -> dict[str, Any]:
    """comparison.json's content from the entrants' runs."""
    first = _first_finished(run for entrant in entrants for run in entrant.runs)
    parameters = first.manifest["base_parameters"]
    comparison = build_comparison(
        [_result(entrant) for entrant in entrants],
        _test_set(config, bench, first),
        data_facts=bench.facts,
        settings=config.model_dump(exclude_none=True),
        base_bytes=parameters * BYTES_PER_PARAMETER[config.model.dtype],
        storage_tasks=config.compare.storage_tasks,
    )
    texts = {example.id: example for example in bench.dataset.test}
    for row in comparison["disagreements"]:
        row["text"] = _text(texts[row["id"]])
    shared = ("order_hash", "machine", "versions")
    return comparison | {key: first.manifest[key] for key in shared}


def loss_curves(entrants: "Sequence[Entrant]") -> dict[str, list[dict[str, Any]]]:
    """Training and validation losses of every run, by method, for the report."""
    return {
        entrant.method: [_curve(run) for run in _all_runs(entrant) if run.finished]
        for entrant in entrants
    }


def _all_runs(entrant: "Entrant") -> list[Run]:
    return list({run.folder: run for run in (*entrant.tried, *entrant.runs)}.values())


def _result(entrant: "Entrant") -> MethodResult:
    facts = entrant.tried[0].manifest
    finished = [run for run in _all_runs(entrant) if run.finished]
    stored = finished[0].manifest if finished else {}
    tried = {run.config.training.learning_rate: run for run in entrant.tried}
    return MethodResult(
        method=entrant.method,
        trainable_parameters=facts["trainable_parameters"],
        total_parameters=facts["total_parameters"],
        rates=tuple(_rate_point(rate, run) for rate, run in sorted(tried.items()) if run.finished),
        best_learning_rate=entrant.sweep.best_rate if entrant.runs else None,
        bracketed=entrant.sweep.bracketed,
        seeds=tuple(_seed_predictions(run, entrant.runs) for run in entrant.runs),
        peak_bytes=entrant.solo["peak_bytes"],
        step_seconds=entrant.solo["step_seconds"],
        artifact_bytes=stored.get("artifact_bytes", 0),
        artifact_needs_base=ARTIFACT_OF[entrant.method] != "model",
        steps=stored.get("steps_done", 0),
        diverged_rates=tuple(rate for rate, run in sorted(tried.items()) if not run.finished),
    )


def _rate_point(rate: float, run: Run) -> RatePoint:
    best = run.manifest["best"]
    return RatePoint(rate, best["nll"], best["accuracy"], run.folder.name)


def _seed_predictions(run: Run, runs: Sequence[Run]) -> SeedPredictions:
    """A seed's answers; of a seed that diverged, answers that nobody can take for good ones."""
    seed = run.config.training.seed
    if not run.finished:
        num_rows = len(_first_finished(runs).predictions("test"))
        return SeedPredictions(seed, np.zeros(num_rows, dtype=int), np.full(num_rows, np.inf))
    rows = run.predictions("test")
    if run.config.model.task == "causal":
        answers = [int(row["exact"]) for row in rows]
        nll = [row["nll"] / max(1, row["target_tokens"]) for row in rows]
    else:
        answers = [row["prediction"] for row in rows]
        nll = [row["nll"] for row in rows]
    return SeedPredictions(seed, np.array(answers), np.array(nll))


def _first_finished(runs: Iterable[Run]) -> Run:
    found = next((run for run in runs if run.finished), None)
    if found is None:
        raise TrainingError(
            "no method has a run that ended in finite numbers",
            "give smaller rates in compare.learning_rates.",
        )
    return found


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
