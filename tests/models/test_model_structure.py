"""Structure is found without names, and presets give the published numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, T5Config, T5EncoderModel, ViTConfig

from loralab.errors import ModelError
from loralab.models import (
    PRESETS,
    blocks,
    build_model,
    embedding_parameters,
    head_name,
    lower_parameters,
    num_parameters,
)

Build = Callable[..., PreTrainedModel]

# Totals of the weight files on the hub (of the language model with its head, tied ones once).
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize(("preset", "published"), PUBLISHED.items())
def test_published_totals(preset: str, published: int) -> None:
    assert num_parameters(build_model(preset, task="causal")) == published


def test_bert_and_gpt3_totals() -> None:
    assert num_parameters(build_model("bert-base").base_model) == 109_482_240
    assert num_parameters(build_model("bert-large").base_model) == 335_141_888
    assert num_parameters(build_model("roberta-base").base_model) + 590_592 == 124_645_632
    assert round(num_parameters(build_model("gpt-3-175b", task="causal")) / 1e9) == 175


def test_the_seeds_counts() -> None:
    model = build_model("llama-3.2-1b", head_bias=True)
    frozen = lower_parameters(model, 12, embedding=False)
    assert num_parameters(model) == 1_235_818_498
    assert num_parameters(model, without=frozen) == 505_960_450
    head = num_parameters(model.get_submodule(head_name(model)))
    assert head == 4_098
    everything = lower_parameters(model, 16, embedding=True)
    assert num_parameters(model, without=everything) == head + 2_048  # and the last norm
    assert model.device.type == "meta"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_has_blocks(preset: str) -> None:
    facts = {**PRESETS[preset]}
    layers = facts.get("num_hidden_layers", facts.get("n_layer"))
    facts |= {"n_layer": 2} if facts["model_type"] == "gpt2" else {"num_hidden_layers": 2}
    model = build_model(facts, dtype="bfloat16")
    assert len(blocks(model)[1]) == 2 < layers
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "name", "embeddings"),
    [
        ("llama", "model.layers", {"model.embed_tokens.weight"}),
        ("gpt2", "transformer.h", {"transformer.wte.weight", "transformer.wpe.weight"}),
        (
            "bert",
            "bert.encoder.layer",
            {
                f"bert.embeddings.{part}"
                for part in (
                    "word_embeddings.weight",
                    "position_embeddings.weight",
                    "token_type_embeddings.weight",
                    "LayerNorm.weight",
                    "LayerNorm.bias",
                )
            },
        ),
    ],
)
def test_blocks_and_embeddings(small: Build, family: str, name: str, embeddings: set[str]) -> None:
    model = small(family)
    assert blocks(model)[0] == name
    assert len(blocks(model)[1]) == 3
    assert embedding_parameters(model) == embeddings


def test_other_architectures() -> None:
    vit = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=20)
    with torch.device("meta"):
        image, text = AutoModel.from_config(vit), T5EncoderModel(t5)
    assert blocks(image)[0].endswith("layer") or blocks(image)[0].endswith("layers")
    assert all(name.startswith("embeddings.") for name in embedding_parameters(image))
    assert blocks(text)[0] == "encoder.block"
    assert embedding_parameters(text) == {"shared.weight", "encoder.embed_tokens.weight"}


def test_tied_names_are_all_given(small: Build) -> None:
    model = small("llama", task="causal", config={"tie_word_embeddings": True})
    assert embedding_parameters(model) == {"model.embed_tokens.weight", "lm_head.weight"}
    untied = small("llama", task="causal", config={"tie_word_embeddings": False})
    assert embedding_parameters(untied) == {"model.embed_tokens.weight"}
    lower = lower_parameters(untied, 1, embedding=True)
    assert {name for name in lower if not name.startswith("model.layers.0.")} == {
        "model.embed_tokens.weight"
    }


def test_the_largest_list_of_like_blocks_wins() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many_small = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))
            self.few_large = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
            self.unlike = nn.ModuleList([nn.Linear(99, 99), nn.ReLU()])
            self.fc = nn.Linear(9, 2)

    assert blocks(Mixed())[0] == "few_large"
    assert head_name(Mixed()) == "fc"


def test_what_is_not_there_is_said(small: Build) -> None:
    with pytest.raises(ModelError, match=r"Linear has no list of repeated blocks\n.*lora, head"):
        blocks(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"has no classification head.*\n.*classification"):
        head_name(small("llama", task="causal"))
    with pytest.raises(ModelError, match=r"freeze 4 layers: model\.layers has 3\n.*from 0 to 3"):
        lower_parameters(small("llama"), 4, embedding=True)
    with pytest.raises(ModelError, match=r"no preset 'llama-3\.2-1'; did you mean 'llama-3\.2-1b'"):
        build_model("llama-3.2-1")
    with pytest.raises(ModelError, match="no model type 'lama'"):
        build_model({"model_type": "lama"})
    with pytest.raises(ModelError, match="no classification model for the type 'clip'"):
        build_model({"model_type": "clip"})


def test_built_weights_come_from_the_seed_alone(small: Build) -> None:
    state = torch.get_rng_state()
    one, same, other = (small("llama", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one._loralab_fresh_head == "score"
    assert not one.training
