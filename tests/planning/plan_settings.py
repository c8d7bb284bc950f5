"""Settings of plans, and small configurations of real architectures."""

from typing import Any

from loralab.config import RunConfig, parse_config

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    },
    "bert": {
        "model_type": "bert",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "vocab_size": 211,
        "max_position_embeddings": 512,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 5,
        "n_head": 4,
        "n_positions": 512,
        "vocab_size": 211,
    },
}


def settings(name: str, **changes: Any) -> RunConfig:
    """Settings without rows; `section__key=value` changes one."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": name},
        "data": {"name": "no rows are read", "max_tokens": 48},
        "method": {"rank": 4, "dropout": 0.1},
        "training": {"batch_size": 3, "device": "cpu"},
        "compare": {},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__", 1)
        tables[section][key] = value
    return parse_config(tables)


def seed_run(**changes: Any) -> RunConfig:
    """The seed's experiment: Llama-3.2-1B, fp32, batch 16, 256 tokens, rank 16, dropout 0.1."""
    seed = {
        "data__max_tokens": 256,
        "method__rank": 16,
        "method__alpha": 32.0,
        "training__batch_size": 16,
    }
    return settings("llama-3.2-1b", **{**seed, **changes})
