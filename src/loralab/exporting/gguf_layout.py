"""How GGUF lays out a decoder: names of tensors, order of rows, and the facts in its header.

Follows llama.cpp's convert_hf_to_gguf.py for the architectures in `ARCHITECTURES`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from gguf import GGUFWriter, RopeScalingType
from jaxtyping import Float

from loralab.errors import ModelError, nearest
from loralab.models import quiet

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Architecture:
    """GGUF's name of it, and whether its rotary pairs are interleaved there (halves in ours)."""

    name: str
    interleaved: bool


# convert_hf_to_gguf.py: LlamaModel permutes queries and keys, the Qwen models do not
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True),
    "MistralForCausalLM": Architecture("llama", interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2", interleaved=False),
    "Qwen3ForCausalLM": Architecture("qwen3", interleaved=False),
}


@dataclass(frozen=True)
class Layout:
    """One model's configuration, as GGUF wants it.

    Raises `ModelError` that lists what of the model GGUF (or this writer) cannot express.
    """

    config: Any
    architecture: Architecture

    @classmethod
    def of(cls, folder: Path) -> "Layout":
        """The layout of the model in a transformers folder."""
        try:
            with quiet():
                config = transformers.AutoConfig.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{folder}: its config.json cannot be read ({error})",
                "give a folder that transformers has saved.",
            ) from None
        kind = (config.architectures or ["none"])[0]
        # a base that was saved with another head, or with none, has the same decoder
        decoder = re.sub(r"(Model|For\w+)$", "ForCausalLM", kind)
        if decoder not in ARCHITECTURES:
            raise ModelError(
                f"{folder} is a {kind}; GGUF is written here for {', '.join(ARCHITECTURES)}"
                f" ({nearest(decoder, ARCHITECTURES)})",
                "merge (`loralab merge`) and convert the result with llama.cpp's own"
                " convert_hf_to_gguf.py.",
            )
        layout = cls(config, ARCHITECTURES[decoder])
        layout._check()
        return layout

    @property
    def head_dim(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return own or self.config.hidden_size // self.config.num_attention_heads

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output layer too."""
        return bool(self.config.tie_word_embeddings)

    def tensor_name(self, name: str) -> str | None:
        """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; None: not known."""
        stem, _, kind = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{kind}"
        found = _BLOCK.fullmatch(stem)
        if found is None or found[2] not in _INNER:
            return None
        return f"blk.{found[1]}.{_INNER[found[2]]}.{kind}"

    def rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """The rows of a weight (or of an adapter's B, or a bias) in GGUF's order.

        Llama's queries and keys hold their rotary halves one after the other here, and as
        neighbours there (`LlamaModel.permute`).
        """
        if not self.architecture.interleaved:
            return values
        for part, heads in (
            ("q_proj", self.config.num_attention_heads),
            ("k_proj", self.config.num_key_value_heads),
        ):
            if f".{part}" in name:
                half = values.shape[0] // heads // 2
                pairs = values.reshape(heads, 2, half, *values.shape[1:])
                return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        return values

    def write_facts(self, writer: GGUFWriter) -> None:
        """The header's facts about sizes and rotary positions."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_vocab_size(config.vocab_size)
        rope = self._rope
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))

    def rope_factors(self) -> Float[np.ndarray, "half"] | None:
        """Llama 3.1's divisors of the rotary frequencies (`rope_freqs.weight`); None: all 1."""
        rope = self._rope
        if rope["rope_type"] != "llama3":
            return None
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
        context = rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
        return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

    @property
    def _rope(self) -> dict[str, Any]:
        return dict(self.config.rope_parameters)

    def _check(self) -> None:
        config, faults = self.config, []
        kind = self._rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3"):
            faults.append(f"rotary positions of type {kind!r}")
        if getattr(config, "hidden_act", "silu") != "silu":
            faults.append(f"the activation {config.hidden_act!r}")
        window = getattr(config, "sliding_window", None)
        used = window is not None and getattr(config, "use_sliding_window", True)
        if used and window < config.max_position_embeddings:
            faults.append(f"attention in a sliding window of {window}")
        if faults:
            raise ModelError(
                "this writer of GGUF does not express " + ", ".join(faults),
                "merge (`loralab merge`) and convert the result with llama.cpp's own"
                " convert_hf_to_gguf.py.",
            )
