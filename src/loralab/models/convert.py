"""A GGUF file of the catalogue -> a plain transformers folder in the cache, once.

Reading GGUF takes many seconds and transformers will not save a model it has read from one, so
the tensors are dequantised here and written as safetensors. They are kept in float32: a Q4_1
value is `d * q + m` with d and m in float16 and q of 4 bits, a Q8_0 value `d * q` with q of 8
bits (ggml-quants.h), 15 to 19 significant bits against bfloat16's 8 and float16's 11. So the
cached folder (540 MB) holds exactly the model that the GGUF file is, and `dtype` rounds once.
"""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from gguf import GGUFReader, dequantize
from jaxtyping import Float
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loralab.catalogue import ENTRIES, cache_folder, fetch
from loralab.errors import ModelError
from loralab.files import cannot_write, replacing, write_json

logger = logging.getLogger("loralab")

_FORMAT = 1  # raise it when the conversion changes, so that old folders are left aside
_SIZES = "sizes.json"
_CONTROL = 3  # token type of special tokens in GGUF
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def converted_folder(name: str) -> Path:
    """The transformers folder of the GGUF model `name` of the catalogue.

    Converted at first use, and again where a file of it is missing or of another size. Several
    processes may ask at once: one converts, the others wait. Raises `FetchError` and
    `OutputError` as `catalogue.fetch` does.
    """
    entry = ENTRIES[name]
    folder = cache_folder() / "converted" / f"{name}-{entry.sha256[:12]}-{_FORMAT}"
    if _is_whole(folder):
        return folder
    source = fetch(name) / entry.main
    with _locked(folder):
        if not _is_whole(folder):
            for half in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
                shutil.rmtree(half, ignore_errors=True)
            logger.info("converting %s for transformers; this happens once", name)
            convert(source, folder)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Writes GGUF file `source` (Llama architecture, byte-level BPE) as a transformers folder."""
    reader = GGUFReader(source)
    facts = _checked_facts(reader, source)
    tensors = _tensors(reader, facts)
    with replacing(folder) as aside:
        aside.mkdir()
        _save(tensors, aside / "model.safetensors")
        write_json(aside / "config.json", _config(facts, tied="lm_head.weight" not in tensors))
        _tokenizer(facts).save(str(aside / "tokenizer.json"))
        write_json(aside / "tokenizer_config.json", _tokenizer_config(facts))
        (aside / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], "utf-8")
        sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
        write_json(aside / _SIZES, sizes)


def _checked_facts(reader: GGUFReader, source: Path) -> dict[str, Any]:
    """The file's key-value pairs; `ModelError` where they tell of another architecture."""
    facts = {key: field.contents() for key, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama" or facts.get("tokenizer.ggml.model") != "gpt2":
        raise ModelError(
            f"{source} holds the architecture {facts.get('general.architecture')} with a "
            f"{facts.get('tokenizer.ggml.model')} tokenizer; only llama with gpt2 is converted",
            "give a folder that transformers has saved.",
        )
    return facts


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _SIZES).read_text("utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _locked(folder: Path) -> FileLock:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return FileLock(folder.with_name(folder.name + ".lock"))


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    # safetensors hides a full disk in an error of its own, so it is looked for first.
    if shutil.disk_usage(path.parent).free < 1.05 * sum(
        values.nbytes for values in tensors.values()
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file(tensors, path, metadata={"format": "pt"})


def _tensors(reader: GGUFReader, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor in float32 under transformers' name."""
    heads = {
        "q_proj": facts["llama.attention.head_count"],
        "k_proj": facts["llama.attention.head_count_kv"],
    }
    found: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        name = _transformers_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        projection = name.split(".")[-2]
        if projection in heads:
            values = _unpermuted(values, heads[projection])
        found[name] = np.ascontiguousarray(values)
    return found


def _transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _unpermuted(
    weight: Float[np.ndarray, "out width"], num_heads: int
) -> Float[np.ndarray, "out width"]:
    """Query and key rows from GGUF's interleaved rotary pairs back to transformers' halves.

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    out, width = weight.shape
    pairs = weight.reshape(num_heads, out // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def _config(facts: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    width = facts["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "head_dim": facts.get("llama.rope.dimension_count", width // heads),
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        # float32 in the file: its shortest decimal is what was meant (1e-05)
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_parameters": {"rope_theta": facts["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
    }


def _tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; `smollm` splits digits one by one in front (llama.cpp's llama-vocab.cpp)."""
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if facts["tokenizer.ggml.pre"] == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
        if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _tokenizer_config(facts: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in facts
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        **special,
    }
