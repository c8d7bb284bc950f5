"""llama.cpp runs what is exported, and says what transformers says with our adapter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tiny_decoder import TEXTS, save_decoder, tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

import loralab
from loralab.adapters import extract
from loralab.errors import AdapterError, ModelError
from loralab.exporting import ENGINES, canonical, write_gguf_adapter, write_gguf_model
from loralab.exporting.gguf_vocabulary import _LLAMA3, split_name
from loralab.models import load_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
# fp32 on both sides, with sums in another order
TOLERANCE_NATS = 2e-3

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, {}),
    "llama 3, untied, biases": (
        LlamaForCausalLM,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "llama, longer positions": (
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0}},
    ),
    "mistral, wide heads": (MistralForCausalLM, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 32}),
}


def start(model: Path, adapter: Path | None = None) -> Any:
    """llama.cpp in this process, with everything that rounds switched off."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params, settings.verbosity = False, -1
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(settings)


def likeliest(server: Any, prompt: Any) -> dict[int, float]:
    """Token -> log-likelihood, of the five likeliest next ones. {}: half a character is held back.

    (llama.cpp tells nothing of a token that is no whole character.)
    """
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    answer = server.handle_completions(asked)
    told = answer["choices"][0]["logprobs"]
    rows = told["content"][0]["top_logprobs"] if told and told["content"] else []
    return {row["id"]: row["logprob"] for row in rows}


def same_prompt(server: Any, text: str, ids: list[int]) -> None:
    """Asserts that llama.cpp cuts the text into those tokens."""
    assert likeliest(server, text) == pytest.approx(likeliest(server, ids), abs=1e-4)


def agree(server: Any, model: Any, route: str | None, texts: tuple[str, ...] = TEXTS) -> int:
    """Asserts that both say the same after growing parts of the texts; how many were compared."""
    words, compared = load_tokenizer(str(model.config._name_or_path)), 0
    for text in texts:
        ids = words(text).input_ids
        for end in range(3, len(ids) + 1, 4):
            found = likeliest(server, ids[:end])
            with torch.no_grad(), loralab.use(model, route):
                wanted = model(torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1)
            if not found:
                continue
            compared += 1
            assert max(found, key=lambda n: found[n]) == int(wanted.argmax())
            theirs = torch.tensor(list(found.values()))
            ours = wanted[list(found)]
            torch.testing.assert_close(theirs, ours, atol=TOLERANCE_NATS, rtol=0)
    return compared


@pytest.mark.parametrize("kind", MODELS)
def test_base_and_adapter_say_what_transformers_says(
    kind: str, make_adapter: Any, tmp_path: Path
) -> None:
    cls, changes = MODELS[kind]
    base = save_decoder(tmp_path / "base", cls, **changes)
    targets: Any = "all-linear"
    if changes.get("tie_word_embeddings") is False:
        targets = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]
    model, _ = make_adapter(
        base, targets=targets, scaling="alpha/sqrt(rank)", rank_pattern={"k_proj": 2}, size=0.1
    )
    found = canonical(extract(model, "a"), ENGINES["llama.cpp"])
    write_gguf_model(str(base), tmp_path / "base.gguf")
    write_gguf_adapter(found.adapter, base, tmp_path / "a.gguf")
    assert agree(start(tmp_path / "base.gguf"), model, None) >= 3
    assert agree(start(tmp_path / "base.gguf", tmp_path / "a.gguf"), model, "a") >= 3


def test_text_is_split_into_the_same_tokens(decoder: Path, tmp_path: Path) -> None:
    write_gguf_model(str(decoder), tmp_path / "base.gguf")
    server, words = start(tmp_path / "base.gguf"), load_tokenizer(str(decoder))
    for text in (*TEXTS, "  two  spaces\n\nand lines 1234, don't", "naïve café → 東京"):
        same_prompt(server, text, words(text).input_ids)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("gpt-2", None),
        ("smollm", pre_tokenizers.Digits(individual_digits=True)),
        ("llama-bpe", pre_tokenizers.Split(Regex(_LLAMA3), "isolated")),
        ("qwen2", pre_tokenizers.Split(Regex(_LLAMA3.replace("{1,3}", "")), "isolated")),
    ],
)
def test_how_text_is_split_is_found_by_the_description(
    name: str, split: Any, tmp_path: Path
) -> None:
    words = tokenizer(split)
    if name == "smollm":  # which splits as GPT-2 does after the digits
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert split_name(json.loads(words.backend_tokenizer.to_str())) == name
    base = save_decoder(tmp_path / "base", words=words)
    write_gguf_model(str(base), tmp_path / "base.gguf")
    server = start(tmp_path / "base.gguf")
    for text in (*TEXTS, "In 12345 DON'T we'll\n\n  x", "tabs\tand 7 words", "a  b   c"):
        same_prompt(server, text, words(text).input_ids)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.4)])
def test_smaller_types_are_near(
    dtype: Any, tolerance: float, decoder: Path, tmp_path: Path
) -> None:
    write_gguf_model(str(decoder), tmp_path / "base.gguf", dtype=dtype)
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "base.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == dtype.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    ids = load_tokenizer(str(decoder))(TEXTS[0]).input_ids
    model = loralab.load_model(str(decoder), task="causal").eval()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = likeliest(start(tmp_path / "base.gguf"), ids)
    assert np.abs([wanted[n].item() - value for n, value in found.items()]).max() < tolerance


class TestRefusals:
    def test_an_architecture_is_named(self, make_adapter: Any, tmp_path: Path) -> None:
        config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
        config.num_attention_heads = 2
        BertModel(config).save_pretrained(tmp_path / "bert")
        with pytest.raises(ModelError, match=r"is a BertModel; GGUF is written here for Llama"):
            write_gguf_model(str(tmp_path / "bert"), tmp_path / "x.gguf")
        assert not (tmp_path / "x.gguf").exists()

    def test_positions_it_does_not_know(self, tmp_path: Path) -> None:
        rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
        base = save_decoder(tmp_path / "base", rope_parameters=rope)
        with pytest.raises(ModelError, match="rotary positions of type 'dynamic'"):
            write_gguf_model(str(base), tmp_path / "x.gguf")

    def test_a_tokenizer_that_splits_otherwise(self, tmp_path: Path) -> None:
        words = tokenizer(pre_tokenizers.Punctuation())
        base = save_decoder(tmp_path / "base", words=words)
        with pytest.raises(ModelError) as caught:
            write_gguf_model(str(base), tmp_path / "x.gguf")
        assert "splits text by ['Punctuation']" in caught.value.cause
        assert "--adapter-only" in caught.value.next_step

    def test_a_tokenizer_that_is_larger_than_the_model(self, tmp_path: Path) -> None:
        base = save_decoder(tmp_path / "base", vocab_size=300)
        with pytest.raises(ModelError, match=r"tokenizer has \d+ tokens, the model 300"):
            write_gguf_model(str(base), tmp_path / "x.gguf")

    def test_a_pair_on_a_tied_embedding(
        self, decoder: Path, make_adapter: Any, tmp_path: Path
    ) -> None:
        model, _ = make_adapter(targets=["embed_tokens", "q_proj"])
        found = canonical(extract(model, "a"), ENGINES["llama.cpp"])
        with pytest.raises(AdapterError, match=r"apply the pair to both\n.*--merged"):
            write_gguf_adapter(found.adapter, decoder, tmp_path / "a.gguf")
