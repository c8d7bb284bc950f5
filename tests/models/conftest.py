from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loralab.models import build_model

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "pad_token_id": 2,
        "eos_token_id": 2,
    },
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "vocab_size": 40},
    "bert": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 40,
    },
}
SMALL["gpt2"] |= {"bos_token_id": 1, "eos_token_id": 2}
SMALL["roberta"] = SMALL["bert"] | {"max_position_embeddings": 40, "type_vocab_size": 1}
SMALL["gemma3_text"] = SMALL["llama"] | {"head_dim": 4, "num_hidden_layers": 7, "sliding_window": 3}
SMALL["qwen2"] = SMALL["llama"]


@pytest.fixture
def small() -> Callable[..., PreTrainedModel]:
    """Builds a tiny random model of a family; its first argument is the model type."""

    def build(family: str, **options: Any) -> PreTrainedModel:
        more = options.pop("config", {})
        facts = {"model_type": family, **SMALL[family], **more}
        return build_model(facts, **{"device": "cpu", **options})

    return build


@pytest.fixture
def saved(small: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny causal (BERT: masked) model without a classification head; gives its folder."""

    def save(family: str, **options: Any) -> Path:
        folder = tmp_path / family
        model = small(family, **options)
        model.base_model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2, 6) and mask; the shorter row is padded on the right, and 2, the padding id of the
    Llama above, stands as a real token at the end of both rows."""
    ids = torch.tensor([[5, 6, 2, 8, 9, 2], [7, 8, 9, 2, 2, 2]])
    return ids, torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
