"""Tiny models built from configuration, and random adapters on them."""

import warnings

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
)

warnings.filterwarnings("ignore", category=DeprecationWarning)


@pytest.fixture
def llama() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        num_labels=3,
        attn_implementation="eager",
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(1))
