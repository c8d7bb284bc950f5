"""Other architectures than the matrix's, both ways with PEFT, and where PEFT differs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_reads, peft_runs, peft_writes, shake
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from zoo import DECODER, logits

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    load_adapter,
    merge,
    save_adapter,
    use,
)
from loralab.errors import AdapterError


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.line = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.line(self.rnn(self.table(x))[0])))


class Translator(nn.Module):
    """torch's own transformer, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.core = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, custom_encoder=encoder)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.table(x.T)
        return self.head(self.core(embedded, embedded)).transpose(0, 1)


class Tied(nn.Module):
    """A parameter under two names that no one declared tied."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.line = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.line(self.table(x))))


class Shared(nn.Module):
    """One layer called three times, and once more under another name."""

    def __init__(self, aliased: bool) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.alias = self.line if aliased else None
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(torch.tanh(self.line(x)))
        return self.head(x if self.alias is None else self.alias(x))


def _whisper() -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    lengths = {"max_source_positions": 20, "max_target_positions": 20, "vocab_size": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **heads, **widths, **lengths, **tokens)  # pyright: ignore
    return WhisperForConditionalGeneration(config)


def _swin() -> nn.Module:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, window_size=4, num_labels=3, **sizes)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], str | None, str | None]] = {
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=40,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                word_embed_proj_dim=8,
                pad_token_id=0,
            )
        ),
        ["q_proj", "fc1"],
        "embed_tokens",
        "final_layer_norm",
    ),
    "swin": (_swin, ["q_proj", "fc1"], None, "classifier"),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=8)),
        ["q_proj", "down_proj"],
        "embed_tokens",
        "norm",
    ),
    "phi3": (
        lambda: Phi3ForCausalLM(Phi3Config(**DECODER)),
        ["qkv_proj", "gate_up_proj"],
        "embed_tokens",
        "norm",
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=3)),
        ["q_proj", "o_proj"],
        "embed_tokens",
        "norm",
    ),
    "resnet": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
        ["convolution"],
        None,
        "normalization",
    ),
    "convnext": (
        lambda: ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3)
        ),
        ["dwconv", "pwconv1"],
        None,
        "classifier",
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
        ),
        ["q_lin", "lin1"],
        "word_embeddings",
        "classifier",
    ),
    "whisper": (_whisper, ["q_proj", "fc1"], "embed_tokens", "layer_norm"),
    "recurrent": (Recurrent, ["line"], "table", "head"),
    "translator": (Translator, ["self_attn", "linear2"], "table", "head"),
    "tied": (Tied, ["line"], "table", None),
    "called often": (lambda: Shared(aliased=False), ["line"], None, "norm"),
}
SETTINGS = ["plain", "patterns", "embeddings", "tokens", "whole", "all"]
CASES = [
    pytest.param(model, setting, id=f"{model}-{setting}")
    for model, (_, _, table, whole) in MODELS.items()
    for setting in SETTINGS
    if not (setting in ("embeddings", "tokens") and table is None)
    and not (setting == "whole" and whole is None)
]


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[name][0]().eval()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (2, 5), generator=generator)
    if name in ("swin", "resnet", "convnext"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name == "whisper":
        features = torch.randn(2, 8, 40, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    if name == "called often":
        return {"x": torch.randn(2, 8, generator=generator)}
    return {"x" if name in ("recurrent", "translator", "tied") else "input_ids": ids}


def settings(name: str, setting: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(PEFT's, ours)."""
    _, targets, table, whole = MODELS[name]
    theirs, ours = {
        "plain": ({}, {}),
        "patterns": (
            {"rank_pattern": {targets[0]: 8}, "alpha_pattern": {targets[-1]: 3}},
            {"rank_pattern": {targets[0]: 8}, "alpha_pattern": {targets[-1]: 3.0}},
        ),
        "embeddings": ({"target_modules": [*targets, table]}, {"targets": [*targets, table]}),
        "tokens": ({"trainable_token_indices": {table: [3, 7]}}, {"token_rows": {table: [3, 7]}}),
        "whole": ({"modules_to_save": [whole]}, {"whole_modules": [whole]}),
        "all": ({"bias": "all"}, {"biases": "all"}),
    }[setting]
    common: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    return common | theirs, {"rank": 4, "alpha": 6.0, "targets": targets} | ours


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_both_ways(name: str, setting: str, tmp_path: Path) -> None:
    base, batch = build(name), inputs(name)
    for_peft, for_us = settings(name, setting)
    if name == "convnext":
        for_peft["r"] = 8  # PEFT wants a multiple of the groups
        for_peft.pop("rank_pattern", None)
    theirs = peft_writes(base, tmp_path / "theirs", **for_peft)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    with use(model, "default"):
        close(logits(model(**batch)), logits(peft_runs(theirs, **batch)))
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(**for_us), seed=1)
    shake(adapter_parameters(ours, "default").values())
    with use(ours, "default"):
        expected = logits(ours(**batch))
    save_adapter(ours, "default", tmp_path / "ours")
    close(logits(peft_runs(peft_reads(base, tmp_path / "ours"), **batch)), expected)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    with use(again, "default"):
        assert torch.equal(logits(again(**batch)), expected)
    merged, _ = merge(ours, "default")
    close(logits(merged(**batch)), expected)


def test_what_no_file_holds_stays_the_models(tmp_path: Path) -> None:
    base, batch = build("gemma2"), inputs("gemma2")  # its embedding has a factor, a buffer
    told: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    theirs = peft_writes(base, tmp_path / "theirs", **told)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    with use(model, "default"):
        close(logits(model(**batch)), logits(peft_runs(theirs, **batch)))


def test_a_layer_of_two_names_is_not_for_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Shared(aliased=True).eval()
    words = "line: it is also called 'alias', and under that name PEFT leaves it alone"
    model = copy.deepcopy(base)
    attach(model, LoRAConfig(rank=2, targets=["line"]))
    with pytest.raises(AdapterError, match=words):
        save_adapter(model, "default", tmp_path / "ours")
    save_adapter(model, "default", tmp_path / "ours", portable=False)
    load_adapter(copy.deepcopy(base), tmp_path / "ours")
    peft_writes(base, tmp_path / "theirs", r=2, target_modules=["line"])
    with pytest.raises(AdapterError, match=words):
        load_adapter(base, tmp_path / "theirs")


def test_a_whole_module_that_ends_as_pefts_own_is_not_for_peft(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("line", nn.Linear(4, 4))
    model.add_module("out", nn.Linear(4, 2))
    attach(model, LoRAConfig(rank=2, targets=["line"], whole_modules=["out"]))
    with pytest.raises(AdapterError, match="out: PEFT would take its own 'lora_dropout' for it"):
        save_adapter(model, "default", tmp_path)


def test_positions_that_are_computed_inside_have_no_low_rank_form() -> None:
    model = build("opt")
    with pytest.raises(AdapterError, match="OPTLearnedPositionalEmbedding, which has no low-rank"):
        attach(model, LoRAConfig(rank=2, targets=["embed_positions"]))


def test_an_adapter_is_made_without_weights_at_hand() -> None:
    with torch.device("meta"):
        model = Recurrent()
    attach(model, LoRAConfig(rank=2, targets="all-linear", whole_modules=["head"]))
    assert all(p.is_meta for p in adapter_parameters(model, "default").values())
