"""What a run stands on: its rows, read and encoded once, and its model, loaded fresh."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from loralab.config import RunConfig
from loralab.data import Dataset, Encoded, encode, encoding_facts, load_dataset
from loralab.events import Listener, Note, Phase
from loralab.models import choose_dtype, load_model, load_tokenizer, name_labels
from loralab.native import products
from loralab.training import (
    PrefixStore,
    Trainable,
    choose_compile,
    choose_device,
    prepare,
    stream_seed,
)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Workbench:
    """Data and tokenizer of a run. Many runs of a comparison share one."""

    config: RunConfig
    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    prefixes: PrefixStore = field(default_factory=PrefixStore)

    @cached_property
    def rows(self) -> dict[str, list[Encoded]]:
        """Encoded rows by split."""
        return {split: self.encode(getattr(self.dataset, split)) for split in SPLITS}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a report states of the rows: sources, counts, what was left out, what was cut."""
        tokens = {split: encoding_facts(self.rows[split]) for split in SPLITS}
        form = "messages" if self.dataset.train[0].messages is not None else "text"
        return {**self.dataset.facts, "form": form, "tokens": tokens}

    def encode(self, examples: tuple) -> list[Encoded]:
        """Examples as this run's model reads them."""
        return encode(
            examples,
            self.tokenizer,
            task=self.config.model.text_task,
            max_tokens=self.config.data.max_tokens,
        )

    def trainable(self, config: RunConfig, start: Path | None = None) -> Trainable:
        """A fresh model made ready for `config.method`, its head drawn from `config`'s seed.

        `start` is where a run kept what its adapter began with; it is used if it is there.
        """
        model = base_model(config)
        if config.model.text_task == "classification":
            name_labels(model, self.dataset.label_names)
        return prepare(
            model,
            config.method,
            config.training,
            task=config.model.text_task,
            rows=self.rows["train"],
            start=start,
        )


def open_workbench(config: RunConfig, listen: Listener) -> Workbench:
    """Read the data and the tokenizer of a run.

    Raises `DataError`, `FetchError` or `ModelError`; nothing is written but the cache.
    """
    listen(Phase(f"reading {config.data.name or config.data.train}", None, "rows"))
    dataset = load_dataset(
        config.data, task=config.model.text_task, num_labels=config.model.num_labels
    )
    tokenizer = load_tokenizer(config.model.name)
    bench = Workbench(config, dataset, tokenizer)
    counts = ", ".join(f"{len(bench.rows[split])} {split}" for split in SPLITS)
    listen(Note(f"{dataset.name}: {counts} rows"))
    return bench


def settle_dtype(config: RunConfig, listen: Listener) -> RunConfig:
    """The settings with `model.dtype = "auto"` replaced by the dtype that is faster here.

    So a run's `config.toml` holds the choice, and resuming does not measure again.
    """
    if config.model.dtype != "auto":
        _say_if_slow(config, listen)
        return config
    chosen = choose_dtype(choose_device(config.training.device).type)
    listen(Note(f"model.dtype is {chosen} here"))
    return config.replace(model__dtype=chosen.dtype)


def _say_if_slow(config: RunConfig, listen: Listener) -> None:
    """A note where the processor has no instructions for the dtype that was asked for."""
    dtype = getattr(torch, config.model.dtype)
    if products.are_widened(dtype, choose_device(config.training.device)):
        listen(
            Note(
                f"this processor has no instructions for {config.model.dtype}: training multiplies "
                'in float32 all the same; model.dtype = "float32" is faster, above all to evaluate'
            )
        )


def settle_compile(
    config: RunConfig, trainable: Trainable, rows: Sequence[Encoded], listen: Listener
) -> tuple[RunConfig, Trainable, dict[str, Any]]:
    """The settings and the trainable with `training.compile = "auto"` replaced by what is faster.

    As with the dtype, `config.toml` holds the choice; the facts for the manifest say why.
    """
    if config.training.compile != "auto":
        return config, trainable, {}
    chosen = choose_compile(trainable, rows)
    listen(Note(f"training.compile is {chosen}"))
    config = config.replace(training__compile=chosen.setting)
    settled = replace(trainable, training=config.training)
    return config, settled, {"compile": chosen.facts()}


def without_compiling(config: RunConfig, listen: Listener) -> RunConfig:
    """The settings of a run in one pass with others, whose shared blocks are not compiled."""
    if config.training.compile == "on":
        listen(Note("training.compile is off: runs in one pass share blocks that are not compiled"))
    return config.replace(training__compile="off")


def base_model(config: RunConfig) -> nn.Module:
    """The base model of a run with its new head, untrained."""
    model = config.model
    return load_model(
        model.name,
        task=model.text_task,
        num_labels=model.num_labels,
        dtype=model.dtype,
        head_bias=model.head_bias,
        head_dropout=model.head_dropout,
        dropout=model.dropout,
        pooling=model.pooling,
        seed=stream_seed(config.training.seed, "initialisation"),
    )
