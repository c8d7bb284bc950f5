"""An adapter with its base model and held-out rows, ready to be measured: a run's, or anyone's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from loralab.adapters import Adapter, Probe, detach, install, read_adapter
from loralab.config import RunConfig, parse_config, with_overrides
from loralab.data import Encoded, Example, encode, halves, load_dataset, load_rows
from loralab.errors import ConfigError, DataError, RunError
from loralab.events import Listener, Phase
from loralab.evidence import RowScores
from loralab.measuring import check_probes, make_probes
from loralab.models import load_tokenizer
from loralab.runs.evaluate import CHECKED_PROBES, FILE_SUFFIXES
from loralab.runs.folder import MANIFEST, Run, open_run
from loralab.runs.workbench import base_model
from loralab.training import choose_device, predict, use_threads

PLACE = "candidate"
FEWEST_ROWS = 20
HEADS = ("score", "classifier")
IMAGE_MODELS = ("UNet2D", "Transformer2D")  # how diffusers' classes begin


@dataclass(frozen=True)
class HeldOut:
    """Rows that had no part in training: some to choose on, others to confirm the choice."""

    choose: list[Encoded]
    confirm: list[Encoded]
    source: str

    def facts(self) -> dict[str, Any]:
        """What a report states of them."""
        return {
            "source": self.source,
            "choose": len(self.choose),
            "confirm": len(self.confirm),
            "choose_documents": len({row.group for row in self.choose}),
            "confirm_documents": len({row.group for row in self.confirm}),
        }


@dataclass(frozen=True)
class Subject:
    """What is measured: `adapter` on the base that `config` names."""

    source: str
    config: RunConfig
    adapter: Adapter
    label_names: tuple[str, ...] = ()
    run: Run | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The base with its untrained head, on its device, hosting nothing that is in force.

        Raises `AdapterError` where the adapter does not fit, or its probes say it is not in force.
        """
        use_threads(self.config.training)
        model = base_model(self.config).to(choose_device(self.config.training.device)).eval()
        if self.adapter.probes:
            install(model, self.adapter, PLACE)
            check_probes(model, self.adapter.probes[:CHECKED_PROBES], PLACE)
            detach(model, PLACE)
        return model

    def scores(self, adapter: Adapter, rows: Sequence[Encoded]) -> RowScores:
        """What `adapter` on the base says of the rows. The base is loaded once for all."""
        install(self.model, adapter, PLACE)
        try:
            found = predict(
                self.model,
                rows,
                task=self.config.model.text_task,
                batch_size=self.config.training.evaluation_batch_size,
                route=PLACE,
            )
        finally:
            detach(self.model, PLACE)
        causal = self.config.model.task == "causal"  # a row is then its mean token
        targets = np.array([max(1, p.num_targets) if causal else 1 for p in found])
        right = [p.num_correct if causal else p.prediction == p.label for p in found]
        nll = np.array([p.nll for p in found])
        return RowScores(nll / targets, np.array(right, dtype=float) / targets)

    def probes(self, adapter: Adapter, rows: Sequence[Encoded]) -> tuple[Probe, ...]:
        """Probes of `adapter` on the base, to be stored with it."""
        install(self.model, adapter, PLACE)
        try:
            return make_probes(self.model, rows, route=PLACE)
        finally:
            detach(self.model, PLACE)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as the base reads them."""
        return encode(
            examples,
            load_tokenizer(self.config.model.name),
            task=self.config.model.text_task,
            max_tokens=self.config.data.max_tokens,
        )


def groups_of(rows: Sequence[Encoded]) -> np.ndarray | None:
    """Each row's document; None where every row is its own."""
    groups = np.array([row.group for row in rows])
    return groups if len(set(groups.tolist())) < len(rows) else None


def open_subject(
    source: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
) -> Subject:
    """A finished LoRA run, or an adapter's folder with its base and data.

    Of an adapter that was trained elsewhere the task, the number of labels and the head are read
    off its file; `overrides` (`section.key=value`) say what it cannot know.

    Raises `RunError` for runs without an adapter, `ConfigError` for what is missing.
    """
    path = Path(source)
    if (path / MANIFEST).is_file():
        return _of_run(open_run(path), base, overrides)
    adapter = read_adapter(path)
    if str(adapter.facts.get("model_class", "")).startswith(IMAGE_MODELS):
        raise ConfigError(
            f"{source} is an adapter of an image model ({adapter.facts['model_class']}), and this"
            " is for language models",
            "`loralab inspect` looks inside it, `loralab evaluate` judges the run that it is of.",
        )
    named = base or adapter.facts.get("base_model")
    faults = [] if named else ["its file does not name its base, and --base is missing"]
    faults += [] if data else ["--data is missing: the rows to measure on"]
    if faults or named is None:
        raise ConfigError(
            f"{source} is an adapter: {'; '.join(faults)}",
            "give for example --base smollm2 --data rows.csv.",
        )
    return Subject(str(source), _config_of(adapter, named, str(data), overrides), adapter)


def _of_run(run: Run, base: str | None, overrides: Sequence[str]) -> Subject:
    if base is not None or overrides:
        raise ConfigError(
            f"{run.folder} is a run, which has its base and settings already",
            f"leave out --base and overrides, or give {run.folder}/adapter.",
        )
    if run.config.method.kind != "lora":
        raise RunError(
            f"{run.folder} has no adapter (its method is {run.config.method.kind})",
            "give a run of method lora"
            + (
                "; of its model, `loralab inspect --extract RANK` makes an adapter."
                if run.config.method.kind in ("full", "frozen")
                else "."
            ),
        )
    adapter = read_adapter(run.artifact)
    return Subject(str(run.folder), run.config, adapter, tuple(run.manifest["label_names"]), run)


def _config_of(adapter: Adapter, base: str, data: str, overrides: Sequence[str]) -> RunConfig:
    """Settings of an adapter that no run is known of."""
    is_file = Path(data).suffix.lower() in FILE_SUFFIXES
    tables: dict[str, Any] = {
        "model": {"name": base, **task_of(adapter)},
        "data": {"train" if is_file else "name": data},
        "training": {"memory_plan": "off"},
    }
    return with_overrides(parse_config(tables, source=base), overrides)


def is_of_language_model(adapter: Adapter) -> bool:
    """Whether its file says so."""
    return adapter.facts.get("model_class", "").endswith(("ForCausalLM", "LMHeadModel"))


def task_of(adapter: Adapter) -> dict[str, Any]:
    """The task and the head as arguments of `load_model`, as far as the adapter's file tells.

    PEFT's files do not tell the pooling: it is then the model's own.
    """
    weights = (
        []
        if is_of_language_model(adapter)
        else [
            tensor
            for key, tensor in adapter.extra.items()
            if key.endswith(".weight") and key.split(".")[-2] in HEADS
        ]
    )
    if not weights:
        classifies = adapter.facts.get("model_class", "").endswith("ForSequenceClassification")
        return {"task": "classification" if classifies else "causal"}
    return {
        "task": "classification",
        "num_labels": max(2, len(weights[0])),
        "head_bias": any(key.endswith("score.bias") for key in adapter.extra),
        "pooling": adapter.pooling or "native",
    }


def held_out(subject: Subject, data: str | None, listen: Listener) -> HeldOut:
    """The rows to choose on and to confirm on.

    A run's own: its validation and its test rows. Of a named data set likewise. Of a file: two
    halves that share no document and no text, by hash.

    Raises `DataError` where either part has fewer than 20 rows, or one document.
    """
    config = subject.config
    own = subject.run is not None and data is None
    named = data or config.data.train or str(config.data.name)
    listen(Phase(f"reading {config.data.name if own else named}"))
    if not own and Path(named).suffix.lower() in FILE_SUFFIXES:
        examples = load_rows(
            named,
            config.data,
            task=config.model.text_task,
            num_labels=config.model.num_labels,
            label_names=subject.label_names or None,
        )
        choose, confirm = halves(examples, "rank")
    else:
        dataset = load_dataset(
            config.data if own or subject.run is None else _other_data(config, named).data,
            task=config.model.text_task,
            num_labels=config.model.num_labels,
        )
        if subject.label_names and dataset.label_names != subject.label_names:
            raise DataError(
                f"{named} is labelled {', '.join(dataset.label_names)}, the run was trained on "
                f"{', '.join(subject.label_names)}",
                "give rows with the same labels.",
            )
        choose, confirm = list(dataset.validation), list(dataset.test)
    _check_parts({"choose": choose, "confirm": confirm}, named)
    return HeldOut(subject.encode(choose), subject.encode(confirm), named)


def _other_data(config: RunConfig, name: str) -> RunConfig:
    places: Mapping[str, Any] = {"name": name, "train": None, "validation": None, "test": None}
    caps = {"train_rows": None, "validation_rows": None, "test_rows": None}
    return config.replace(**{f"data__{key}": value for key, value in {**places, **caps}.items()})


def _check_parts(parts: Mapping[str, Sequence[Example]], name: str) -> None:
    faults = []
    for purpose, rows in parts.items():
        documents = len({row.group for row in rows})
        if len(rows) < FEWEST_ROWS or documents < 2:
            faults.append(f"{len(rows)} rows of {documents} documents to {purpose} on")
    if faults:
        raise DataError(
            f"{name} has too few held-out rows: {', '.join(faults)}",
            f"give at least {FEWEST_ROWS} rows for each, of several documents; a hundred of each"
            " is a sensible least.",
        )
