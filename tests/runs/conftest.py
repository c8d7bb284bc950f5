"""A tiny model folder and rows it can learn, so that a whole run takes a second."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from loralab.config import RunConfig, parse_config

GOOD = ["fine", "bright", "warm", "clever", "moving", "sharp"]
BAD = ["dull", "cold", "slow", "empty", "false", "tired"]
FILLER = ["film", "the", "a", "is", "and", "story", "cast", "end", "it", "was", "plot", "scene"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word tokenizer, saved as a transformers folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    words = models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 texts whose sentiment words give their label, with a tenth of them mislabelled."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "films.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for index in range(600):
            label = index % 2
            words = [*generator.choice(GOOD if label else BAD, 2), *generator.choice(FILLER, 6)]
            generator.shuffle(words)
            noisy = label if generator.random() > 0.1 else 1 - label
            writer.writerow([" ".join([*words, FILLER[index % len(FILLER)]]), noisy])
    return path


@pytest.fixture(scope="session")
def settings(tiny_model: Path, rows_csv: Path) -> Callable[..., RunConfig]:
    """Settings of a run of seconds; `section__key=value` changes one."""

    def build(**changes: Any) -> RunConfig:
        tables: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_model), "pooling": "mean"},
            "data": {"train": str(rows_csv), "max_tokens": 32},
            "method": {"rank": 4, "alpha": 8.0},
            "training": {
                "learning_rate": 1e-2,
                "batch_size": 16,
                "epochs": 2,
                "threads": 1,
                "device": "cpu",
                "memory_plan": "off",
            },
            "compare": {
                "learning_rates": {
                    "head": [3e-3, 3e-2, 3e-1],
                    "lora": [1e-3, 1e-2, 1e-1],
                    "frozen": [1e-4, 1e-3, 1e-2],
                    "full": [1e-4, 1e-3, 1e-2],
                },
                "measured_steps": 2,
            },
        }
        for dotted, value in changes.items():
            section, key = dotted.split("__", 1)
            tables[section][key] = value
        return parse_config(tables)

    return build
