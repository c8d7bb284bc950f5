"""`loralab evaluate`: what a trained model scores on held-out rows, with intervals."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from loralab.adapters import Adapter, install, read_adapter
from loralab.config import RunConfig
from loralab.data import Encoded, load_dataset, load_rows
from loralab.errors import DataError
from loralab.events import Listener, Phase, ignore
from loralab.files import write_json, write_json_lines
from loralab.measuring import check_probes, classification_metrics, completion_metrics
from loralab.runs.folder import HEAD_FILE, Run, open_run
from loralab.runs.images import evaluate_images
from loralab.runs.workbench import Workbench, base_model, open_workbench
from loralab.training import ADAPTER_NAME, Prediction, choose_device, predict, use_threads

CHECKED_PROBES = 4  # at every load; a merge is measured on all of them
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
    On the run's own data the rows and figures are stored in the run's `evaluation/`. A run of an
    image model is judged on images that it draws.

    Returns the figures: `metrics` with 95 % intervals, rows, documents. Raises `RunError` where
    the run is not finished, `DataError` for rows that do not fit its task.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if run.config.model.task == "image":
        return evaluate_images(run, data=data, split=split, listen=listen)
    _ = run.artifact  # not finished, or removed: say so before reading data
    bench = workbench or open_workbench(run.config, listen)
    encoded = bench.rows[split] if data is None else _other_rows(run, bench, data, split)
    listen(Phase(f"scoring {len(encoded)} rows"))
    model, route = trained_model(run)
    rows, document = score(model, route, encoded, run.config)
    document = {
        "run": str(run.folder),
        "data": data or bench.dataset.name,
        "split": split,
        **document,
    }
    if data is None:
        store_evaluation(run, split, rows, document)
    return document


def trained_model(run: Run, device: str | None = None) -> tuple[nn.Module, str | None]:
    """The trained model of a finished run, and the adapter's name if it has one.

    device: instead of the one that the run's settings name.

    Raises `AdapterError` where the adapter's probes show that it is not in force.
    """
    config = run.config
    use_threads(config.training)
    place = choose_device(device or config.training.device)
    if run.artifact.name == "model":
        model = base_model(config.replace(model__name=str(run.artifact)))
    elif run.artifact.name == "head":
        model = base_model(config)
        model.load_state_dict(load_file(run.artifact / HEAD_FILE), strict=False)
    else:
        return adapted(base_model(config), read_adapter(run.artifact), place), ADAPTER_NAME
    return model.to(place).eval(), None


def adapted(base: nn.Module, adapter: Adapter, device: torch.device) -> nn.Module:
    """The base with the adapter as `ADAPTER_NAME`, on the device; some of its probes are checked.

    Raises `AdapterError` where it does not fit, or where the probes show that it is not in force.
    """
    install(base, adapter, ADAPTER_NAME)
    base = base.to(device).eval()
    if adapter.probes:
        check_probes(base, adapter.probes[:CHECKED_PROBES], ADAPTER_NAME)
    return base


def score(
    model: nn.Module, route: str | None, encoded: list[Encoded], config: RunConfig
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The predictions (one an example) and the figures of rows."""
    if not encoded:
        raise DataError("there are no rows to score", "choose another --split or other --data.")
    predictions = predict(
        model,
        encoded,
        task=config.model.text_task,
        batch_size=config.training.evaluation_batch_size,
        route=route,
    )
    document = {
        "task": config.model.task,
        "rows": len(predictions),
        "documents": len({prediction.group for prediction in predictions}),
        "metrics": _metrics(predictions, encoded, config),
    }
    return [_as_row(prediction, config.model.task) for prediction in predictions], document


def store_evaluation(
    run: Run, split: str, rows: list[dict[str, Any]], document: dict[str, Any]
) -> None:
    """Write a split's rows and figures into the run's `evaluation/`."""
    write_json_lines(run.folder / "evaluation" / f"{split}.jsonl", rows)
    write_json(run.folder / "evaluation" / f"{split}.json", document)


def _metrics(
    predictions: list[Prediction], encoded: list[Encoded], config: RunConfig
) -> dict[str, Any]:
    names, groups = np.unique([prediction.group for prediction in predictions], return_inverse=True)
    documents = groups if len(names) < len(predictions) else None
    nll = np.array([prediction.nll for prediction in predictions])
    if config.model.task == "causal":
        tokens = np.array([prediction.num_targets for prediction in predictions])
        exact = np.array([prediction.exact for prediction in predictions])
        figures = completion_metrics(exact, nll / np.maximum(tokens, 1), tokens, documents)
        return {"exact_match": figures.pop("accuracy"), **figures}
    return classification_metrics(
        np.array([row.label for row in encoded]),
        np.array([prediction.prediction for prediction in predictions]),
        nll,
        config.model.num_labels,
        documents,
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


def _other_rows(run: Run, bench: Workbench, data: str, split: str) -> list[Encoded]:
    """All rows of a file, or a split of a named set, with the run's own columns and labels."""
    config, names = run.config, tuple(run.manifest["label_names"])
    if Path(data).suffix.lower() in FILE_SUFFIXES:
        examples = load_rows(
            data,
            config.data,
            task=config.model.text_task,
            num_labels=config.model.num_labels,
            label_names=names or None,
        )
        return bench.encode(examples)
    places = {"name": data, "train": None, "validation": None, "test": None}
    caps = {"train_rows": None, "validation_rows": None, "test_rows": None}
    other = config.replace(**{f"data__{key}": value for key, value in {**places, **caps}.items()})
    dataset = load_dataset(
        other.data, task=config.model.text_task, num_labels=config.model.num_labels
    )
    if dataset.label_names != names:
        raise DataError(
            f"{data} is labelled {', '.join(dataset.label_names)}, the run was trained on "
            f"{', '.join(names)}",
            "give rows with the same labels.",
        )
    return bench.encode(getattr(dataset, split))
