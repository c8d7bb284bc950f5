"""Facts about the sizes of published models, for plans and counts without any weights.

Each preset is a transformers configuration: `model_type` and what differs from that type's
defaults. Source: the `config.json` of each model on the hub; for gpt-3-175b Brown et al. 2020
(arXiv:2005.14165), table 2.1, in OPT's architecture: GPT-3's with separate q, k and v, so that the
LoRA paper's adapters (arXiv:2106.09685, on q and v) can be counted. Base and instruct models of a
release have one size, llama-3.3-70b that of llama-3.1-70b; mistral-7b is its v0.1.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Facts = dict[str, Any]


def _llama3(width: int, inner: int, layers: int, heads: int, *, factor: float, tied: bool) -> Facts:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        **_llama(width, inner, layers, heads, kv_heads=8, vocabulary=128256, context=131072),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    vocabulary: int = 32000,
    context: int = 4096,
) -> Facts:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
    }


def _smollm2(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Facts:
    theta = 130000.0 if width == 2048 else 100000.0
    return {
        **_llama(width, inner, layers, heads, kv_heads=kv_heads, vocabulary=49152, context=8192),
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def _qwen(
    kind: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    tied: bool = False,
    vocabulary: int = 151936,
) -> Facts:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768 if kind == "qwen2" else 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }


def _mistral(vocabulary: int, theta: float, sliding_window: int | None) -> Facts:
    return {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": sliding_window,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _gemma(
    kind: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, *, head: int = 256
) -> Facts:
    per_kind: dict[str, Facts] = {
        "gemma2": {"vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096},
        "gemma3_text": {"vocab_size": 262144, "max_position_embeddings": 32768},
    }
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "tie_word_embeddings": True,
        **per_kind[kind],
    }


def _phi3(width: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Facts:
    return {
        "model_type": "phi3",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _gpt2(width: int, layers: int, heads: int, *, context: int = 1024) -> Facts:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "vocab_size": 50257,
    }


def _bert(kind: str, width: int, layers: int, heads: int) -> Facts:
    vocabulary = {"bert": 30522, "roberta": 50265}[kind]
    more: dict[str, Facts] = {
        "bert": {"max_position_embeddings": 512},
        "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    }
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        **more[kind],
    }


_LLAMA_70B = _llama3(8192, 28672, 80, 64, factor=8.0, tied=False)

_GPT3: Facts = {
    "model_type": "opt",
    "vocab_size": 50257,
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "ffn_dim": 4 * 12288,
    "max_position_embeddings": 2048,
    "activation_function": "gelu",
}


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3.2-1b": _llama3(2048, 8192, 16, 32, factor=32.0, tied=True),
        "llama-3.2-3b": _llama3(3072, 8192, 28, 24, factor=32.0, tied=True),
        "llama-3.1-8b": _llama3(4096, 14336, 32, 32, factor=8.0, tied=False),
        "llama-3.1-70b": _LLAMA_70B,
        "llama-3.3-70b": _LLAMA_70B,
        "llama-2-7b": _llama(4096, 11008, 32, 32),
        "llama-2-13b": _llama(5120, 13824, 40, 40),
        "llama-2-70b": _llama(8192, 28672, 80, 64, kv_heads=8),
        "smollm2-135m": _smollm2(576, 1536, 30, 9, 3),
        "smollm2-360m": _smollm2(960, 2560, 32, 15, 5),
        "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32),
        "qwen2.5-0.5b": _qwen("qwen2", 896, 4864, 24, 14, 2, tied=True),
        "qwen2.5-1.5b": _qwen("qwen2", 1536, 8960, 28, 12, 2, tied=True),
        "qwen2.5-3b": _qwen("qwen2", 2048, 11008, 36, 16, 2, tied=True),
        "qwen2.5-7b": _qwen("qwen2", 3584, 18944, 28, 28, 4, vocabulary=152064),
        "qwen2.5-14b": _qwen("qwen2", 5120, 13824, 48, 40, 8, vocabulary=152064),
        "qwen2.5-32b": _qwen("qwen2", 5120, 27648, 64, 40, 8, vocabulary=152064),
        "qwen2.5-72b": _qwen("qwen2", 8192, 29568, 80, 64, 8, vocabulary=152064),
        "qwen3-0.6b": _qwen("qwen3", 1024, 3072, 28, 16, 8, tied=True),
        "qwen3-1.7b": _qwen("qwen3", 2048, 6144, 28, 16, 8, tied=True),
        "qwen3-4b": _qwen("qwen3", 2560, 9728, 36, 32, 8, tied=True),
        "qwen3-8b": _qwen("qwen3", 4096, 12288, 36, 32, 8),
        "qwen3-14b": _qwen("qwen3", 5120, 17408, 40, 40, 8),
        "qwen3-32b": _qwen("qwen3", 5120, 25600, 64, 64, 8),
        "mistral-7b": _mistral(32000, 10000.0, 4096),
        "mistral-7b-v0.1": _mistral(32000, 10000.0, 4096),
        "mistral-7b-v0.3": _mistral(32768, 1000000.0, None),
        "gemma-2-2b": _gemma("gemma2", 2304, 9216, 26, 8, 4),
        "gemma-2-9b": _gemma("gemma2", 3584, 14336, 42, 16, 8),
        "gemma-2-27b": _gemma("gemma2", 4608, 36864, 46, 32, 16, head=128),
        "gemma-3-270m": _gemma("gemma3_text", 640, 2048, 18, 4, 1),
        "gemma-3-1b": _gemma("gemma3_text", 1152, 6912, 26, 4, 1),
        "phi-3-mini": _phi3(3072, 8192, 32, 32, 32, vocab_size=32064),
        "phi-3-medium": _phi3(5120, 17920, 40, 40, 10, vocab_size=32064),
        "phi-4": _phi3(
            5120,
            17920,
            40,
            40,
            10,
            vocab_size=100352,
            max_position_embeddings=16384,
            original_max_position_embeddings=16384,
            rope_parameters={"rope_type": "default", "rope_theta": 250000.0},
            bos_token_id=100257,
            eos_token_id=100265,
            pad_token_id=100349,
        ),
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
        "gpt-3-175b": _GPT3,
        "bert-base": _bert("bert", 768, 12, 12),
        "bert-large": _bert("bert", 1024, 24, 16),
        "roberta-base": _bert("roberta", 768, 12, 12),
        "roberta-large": _bert("roberta", 1024, 24, 16),
    }
)
"""Facts by name, each ready for `build_model`."""
