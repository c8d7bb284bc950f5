"""`loralab evaluate`: what a trained model scores on held-out rows, with intervals."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from loralab.adapters import load_adapter
from loralab.config import RunConfig
from loralab.data import Encoded
from loralab.errors import DataError
from loralab.events import Listener, Phase, ignore
from loralab.files import write_json, write_json_lines
from loralab.measuring import causal_metrics, classification_metrics
from loralab.runs.folder import Run, open_run
from loralab.runs.workbench import Workbench, base_model, open_workbench
from loralab.training import ADAPTER_NAME, Prediction, choose_device, predict, use_threads

FILE_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")


def evaluate(
    run: Run | str | Path,
    *,
    data: str | None = None,
    split: str = "test",
    listen: Listener = ignore,
    workbench: Workbench | None = None,
) -> dict[str, Any]:
    """Score a finished run on a split of its own data, or on other rows.

    `data` is a catalogue name, hub id or folder (its `split` is used) or a file (all its rows).
    On the run's own data the rows and figures are stored in the run's `evaluation/`.

    Returns the figures: `metrics` with 95 % intervals, rows, documents. Raises `RunError` where
    the run is not finished, `DataError` for rows that do not fit its task.
    """
    run = run if isinstance(run, Run) else open_run(run)
    _ = run.artifact  # not finished, or removed: say so before reading data
    config = run.config if data is None else _other_data(run.config, data)
    bench = workbench or open_workbench(config, listen)
    if data is not None:
        _same_labels(run, bench)
    listen(Phase(f"scoring {split}", None, "rows"))
    model, route = trained_model(run)
    chosen = "test" if data is not None and config.data.name is None else split
    rows, document = score(model, route, bench, run.config, chosen)
    document |= {"run": str(run.folder), "data": data or bench.dataset.name}
    if data is None:
        store_evaluation(run, split, rows, document)
    return document


def trained_model(run: Run) -> tuple[nn.Module, str | None]:
    """The trained model of a finished run on its device, and the adapter's name if it has one."""
    config = run.config
    use_threads(config.training)
    if run.artifact.name == "adapter":
        model = base_model(config)
        load_adapter(model, run.artifact, name=ADAPTER_NAME)
        route = ADAPTER_NAME
    else:
        model = base_model(config.replace(model__name=str(run.artifact)))
        route = None
    return model.to(choose_device(config.training.device)).eval(), route


def score(
    model: nn.Module, route: str | None, bench: Workbench, config: RunConfig, split: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows (one an example) and the figures of one split."""
    encoded = bench.rows[split]
    if not encoded:
        raise DataError(f"the {split} split has no rows", "choose another --split.")
    predictions = predict(
        model,
        encoded,
        task=config.model.task,
        batch_size=config.training.evaluation_batch_size,
        route=route,
    )
    document = {
        "split": split,
        "task": config.model.task,
        "rows": len(predictions),
        "documents": len({prediction.group for prediction in predictions}),
        "metrics": _metrics(predictions, encoded, config),
    }
    return [_as_row(prediction, config.model.task) for prediction in predictions], document


def store_evaluation(
    run: Run, split: str, rows: list[dict[str, Any]], document: dict[str, Any]
) -> dict[str, Any]:
    """Write a split's rows and figures into the run's `evaluation/`."""
    write_json_lines(run.folder / "evaluation" / f"{split}.jsonl", rows)
    write_json(run.folder / "evaluation" / f"{split}.json", document)
    return document


def _metrics(
    predictions: list[Prediction], encoded: list[Encoded], config: RunConfig
) -> dict[str, Any]:
    groups = np.array([prediction.group for prediction in predictions])
    nll = np.array([prediction.nll for prediction in predictions])
    if config.model.task == "causal":
        return causal_metrics(
            nll,
            np.array([p.num_targets for p in predictions]),
            np.array([p.num_correct for p in predictions]),
            groups=groups,
        )
    return classification_metrics(
        np.array([row.label for row in encoded]),
        np.array([prediction.prediction for prediction in predictions]),
        nll,
        config.model.num_labels,
        groups,
    )


def _as_row(prediction: Prediction, task: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": prediction.id, "group": prediction.group, "nll": prediction.nll}
    if task == "classification":
        row |= {
            "label": prediction.label,
            "prediction": prediction.prediction,
            "probabilities": list(prediction.probabilities or ()),
        }
    else:
        row |= {
            "target_tokens": prediction.num_targets,
            "correct_tokens": prediction.num_correct,
            "exact": prediction.exact,
        }
    return row


def _other_data(config: RunConfig, data: str) -> RunConfig:
    """The same settings with other rows: all rows of a file, or a split of a named set."""
    own = {"train_rows": None, "validation_rows": None, "test_rows": None}
    if Path(data).suffix.lower() in FILE_SUFFIXES:
        places = {"name": None, "train": None, "validation": None, "test": data}
    else:
        places = {"name": data, "train": None, "validation": None, "test": None}
    changes = {f"data__{key}": value for key, value in {**own, **places}.items()}
    return config.replace(**changes)


def _same_labels(run: Run, bench: Workbench) -> None:
    trained, given = tuple(run.manifest["label_names"]), bench.dataset.label_names
    if trained != given:
        raise DataError(
            f"the rows are labelled {', '.join(given)}, the run was trained on "
            f"{', '.join(trained)}",
            "give rows with the same labels.",
        )
