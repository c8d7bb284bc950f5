"""A finished run as plain data for its report."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from loralab.runs.folder import Run

PURPOSES = {
    "config.toml": "every setting",
    "manifest.json": "versions, machine, data order, what was chosen",
    "metrics.jsonl": "a row a step and a validation",
    "timing.jsonl": "seconds a step",
    "adapter": "the adapter, in PEFT's format",
    "model": "the trained model, a transformers folder",
    "evaluation": "a row an example, and the figures",
}


def run_report(run: Run) -> dict[str, Any]:
    """What `reports.write_run_report` draws."""
    rows = run.rows_of("metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_nll" in row]
    evaluations = {split: run.metrics(split) for split in run.manifest["splits"]}
    last: dict[str, Any] = next((e["metrics"] for e in reversed(evaluations.values())), {})
    roles = steps[0]["learning_rates"] if steps else {}
    return {
        "run": str(run.folder),
        "method": run.config.method.kind,
        "model": run.config.model.name,
        "seed": run.config.training.seed,
        "steps": run.manifest["steps_done"],
        "best_step": run.manifest["best"]["step"],
        "evaluation": evaluations,
        "train": [[row["step"], row["loss"]] for row in steps],
        "validation": [
            [row["step"], row["validation_nll"], row["validation_accuracy"]] for row in validations
        ],
        "learning_rates": {
            role: [[row["step"], row["learning_rates"][role]] for row in steps] for role in roles
        },
        "confusion_matrix": last.get("confusion_matrix"),
        "per_class": last.get("per_class"),
        "label_names": run.manifest["label_names"],
        "findings": run.manifest["findings"],
        "parameters": {
            "trainable": run.manifest["trainable_parameters"],
            "total": run.manifest["total_parameters"],
            "artifact_bytes": run.manifest["artifact_bytes"],
        },
        "timing": timing_of(run),
        "commands": [
            {"purpose": "score other rows", "command": f"loralab evaluate {run.folder} --data ..."},
            {"purpose": "try it", "command": f'loralab generate {run.folder} "..."'},
        ],
        "files": files_of(run, PURPOSES),
        "data": run.manifest["data"],
        "settings": {k: v for k, v in run.config.tables().items() if k != "compare"},
        "machine": run.manifest["machine"],
        "versions": run.manifest["versions"],
    }


def files_of(run: Run, purposes: Mapping[str, str]) -> list[dict[str, Any]]:
    """The files and folders of the run that are there, with their sizes."""
    return [
        {"path": name, "bytes": _size(run, name), "purpose": purpose}
        for name, purpose in purposes.items()
        if (run.folder / name).exists()
    ]


def timing_of(run: Run) -> dict[str, float]:
    """Seconds of a step and of all of them."""
    seconds = [row["seconds"] for row in run.rows_of("timing.jsonl") if "seconds" in row]
    return {"step_seconds": median(seconds), "all_steps_seconds": sum(seconds)} if seconds else {}


def _size(run: Run, name: str) -> int:
    path = run.folder / name
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
