"""Tiny models and rows, made from configuration and numbers alone."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import BertConfig, LlamaConfig, PreTrainedModel

from loralab.config import MethodSection, TrainingSection
from loralab.data import Encoded
from loralab.models import build_model
from loralab.training import Event, Trainable, fit, prepare

VOCABULARY = 97


def llama(task: str = "classification", **changes: Any) -> PreTrainedModel:
    """Three blocks, width 24, tied embeddings unless changed."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return build_model(config, task=task, device="cpu", seed=1, **changes)


def bert(**changes: Any) -> PreTrainedModel:
    """Two blocks with BERT's own dropout of 0.1."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return build_model(config, task="classification", device="cpu", seed=1, **changes)


def labelled_rows(count: int, seed: int = 0) -> list[Encoded]:
    """Rows whose label is whether token 5 occurs."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        ids = [draw.randrange(6, VOCABULARY) for _ in range(draw.randrange(3, 12))]
        label = draw.randrange(2)
        if label:
            ids[draw.randrange(len(ids))] = 5
        name = f"r{seed}-{index}"
        rows.append(Encoded(id=name, group=name, input_ids=tuple(ids), label=label))
    return rows


def causal_rows(count: int, seed: int = 0) -> list[Encoded]:
    """Counting upwards; the first third of a row has no loss."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        start, length = draw.randrange(1, 40), draw.randrange(4, 12)
        ids = tuple(range(start, start + length))
        targets = tuple(-100 if place < length // 3 else i for place, i in enumerate(ids))
        name = f"c{seed}-{index}"
        rows.append(Encoded(id=name, group=name, input_ids=ids, targets=targets))
    return rows


def training(**changes: Any) -> TrainingSection:
    """Quick settings on one CPU thread."""
    settings = {
        "learning_rate": 1e-2,
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
        "checkpoint_steps": 3,
    }
    return TrainingSection.model_validate(settings | changes)


def ready(
    kind: str = "lora",
    *,
    model: PreTrainedModel | None = None,
    task: str = "classification",
    method: dict[str, Any] | None = None,
    **changes: Any,
) -> Trainable:
    """A model prepared for a method."""
    section = MethodSection.model_validate({"kind": kind, "rank": 4, "alpha": 8.0} | (method or {}))
    model = llama(task) if model is None else model
    return prepare(model, section, training(**changes), task=task)


def run(
    trainable: Trainable,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    folder: Path,
) -> list[Event]:
    """All events of a whole run."""
    return list(fit(trainable, rows, validation, folder))


def of_kind(events: Sequence[Event], kind: type) -> Iterator[Any]:
    """The events of one kind."""
    return (event for event in events if isinstance(event, kind))
