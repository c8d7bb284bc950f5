"""Plain data -> one HTML file each, which opens without a network and reads without JavaScript.

The room knows no other room's types: it takes dictionaries as they stand in comparison.json and in
a run directory, and leaves out every part that is missing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.reports import formats
from loralab.reports.comparison import comparison_page
from loralab.reports.explain import write_explanation
from loralab.reports.forgetting import forgetting_page
from loralab.reports.images import image_page
from loralab.reports.page import write_page
from loralab.reports.plan import plan_page
from loralab.reports.rank import rank_page
from loralab.reports.run import run_page
from loralab.reports.xray import xray_page

__all__ = [
    "formats",
    "write_comparison_report",
    "write_explanation",
    "write_forgetting_report",
    "write_image_report",
    "write_plan_report",
    "write_rank_report",
    "write_run_report",
    "write_xray_report",
]


def write_comparison_report(
    comparison: Mapping[str, Any],
    path: str | Path,
    *,
    loss_curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the report of a comparison to `path`, whole or not at all.

    `comparison` is what comparison.json holds. `loss_curves` has for each method a list of runs:
    `{"run": str, "learning_rate": float, "seed": int, "train": [[step, loss], ...],
    "validation": [[step, loss], ...]}`; runs at the best rate are drawn, where there are any.

    Raises `OutputError` where the file cannot be written.
    """
    write_page(comparison_page(comparison, loss_curves), path)


def write_run_report(run: Mapping[str, Any], path: str | Path) -> None:
    """Write the report of one training run to `path`, whole or not at all.

    Keys of `run`, each optional:
    - `run` (its folder), `method`, `model`, `seed`, `steps`, `best_step`, `summary` (a sentence)
    - `evaluation`: {split: {"rows": int, "metrics": {name: {"value" or "mean", "low", "high"}}}}
    - `train`: [[step, loss], ...]; `validation`: [[step, loss, accuracy or nothing], ...]
    - `learning_rates`: {parameter group: [[step, rate], ...]}
    - `confusion_matrix` (rows = truth), `label_names`
    - `per_class`: rows with label, precision, recall, f1, support
    - `findings`: [{"level", "name", "message", "next_step"}, ...]; an empty list says "none"
    - `parameters` and `timing`: tables, units by the end of the key (`_bytes`, `_seconds`)
    - `commands`: [{"purpose", "command"}, ...]; `files`: [{"path", "bytes", "purpose"}, ...]
    - `data`, `settings`, `machine`, `versions`: tables

    Raises `OutputError` where the file cannot be written.
    """
    write_page(run_page(run), path)


def write_image_report(run: Mapping[str, Any], path: str | Path) -> None:
    """Write the report of a run of an image model to `path`, whole or not at all.

    Keys of `run`, each optional: those of `write_run_report` but for what only text has, and
    - `adapters` (names), `train`: {adapter: [[step, loss], ...]}
    - `sheets`: [{"title", "caption", "columns", "strips": [{"label", "detail", "png" (base64)}]}]
    - `judged`: what `evaluation/images.json` holds

    Raises `OutputError` where the file cannot be written.
    """
    write_page(image_page(run), path)


def write_xray_report(document: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of what `loralab inspect --json` prints to `path`, whole or not at all.

    Raises `OutputError` where the file cannot be written.
    """
    write_page(xray_page(document), path)


def write_plan_report(plan: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of a memory plan (what `loralab plan --json` prints) to `path`.

    Raises `OutputError` where the file cannot be written.
    """
    write_page(plan_page(plan), path)


def write_rank_report(document: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of what `loralab rank --json` prints to `path`, whole or not at all.

    Raises `OutputError` where the file cannot be written.
    """
    write_page(rank_page(document), path)


def write_forgetting_report(document: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of what `loralab evaluate --forgetting --json` prints to `path`.

    Raises `OutputError` where the file cannot be written.
    """
    write_page(forgetting_page(document), path)
