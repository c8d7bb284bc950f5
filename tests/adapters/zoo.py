"""Tiny models of many architectures, built from configuration, with inputs for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


class ConvNet(nn.Module):
    """Convolutions in one, two and three dimensions, with stride, padding and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, (3, 1), bias=False)
        self.line = nn.Conv1d(6, 4, 3, padding=1)
        self.cube = nn.Conv3d(1, 2, 2)
        self.classifier = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.norm(self.first(x))))
        x = self.line(x.flatten(2))
        return self.classifier(
            self.cube(x[:, None, :, :, None].expand(-1, -1, -1, -1, 2)).mean((2, 3, 4))
        )


class Perceptron(nn.Module):
    """A plain network that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(self.table(x)).mean(1))


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def _qwen2() -> nn.Module:
    return Qwen2ForSequenceClassification(Qwen2Config(**DECODER, num_labels=3))


def _mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**DECODER))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


def _bert() -> nn.Module:
    sizes = {key: DECODER[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    return BertForSequenceClassification(
        BertConfig(
            **sizes,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "vit": _vit,
    "convnet": ConvNet,
    "perceptron": Perceptron,
}


def build(name: str) -> nn.Module:
    """The model, with weights that depend on nothing but its name."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[name]().eval()


def inputs(name: str, num_rows: int = 3) -> dict[str, Tensor]:
    """A batch of the model's inputs as keywords."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(num_rows, 3, 8, 8, generator=generator)}
    if name == "convnet":
        return {"x": torch.randn(num_rows, 3, 9, 9, generator=generator)}
    ids = torch.randint(1, 40, (num_rows, 6), generator=generator)
    if name == "perceptron":
        return {"x": ids}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :4]}
    return {"input_ids": ids}


def logits(output: Any) -> Tensor:
    """The tensor to compare, whatever the model returns."""
    return output if isinstance(output, Tensor) else output.logits
