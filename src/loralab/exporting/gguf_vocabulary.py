"""A byte-level BPE tokenizer in GGUF's words.

llama.cpp knows how a tokenizer splits text by a name (`tokenizer.ggml.pre`); it is found here by
what the tokenizer's own description says, and a tokenizer that splits otherwise is refused.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from loralab.errors import ModelError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# what comes before byte-level BPE -> llama.cpp's name of it (src/llama-vocab.cpp)
_SPLITS = {
    (): "gpt-2",
    ("digits",): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
}
_NORMALISED = {"qwen2": ("NFC",)}  # llama.cpp normalises nothing; NFC changes no usual text


def write_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Writes tokens, merges, special tokens and the chat template.

    vocab_size: of the model, which may be larger than the tokenizer's.
    Raises `ModelError` for a tokenizer that llama.cpp would split text otherwise with.
    """
    told = _description(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(told))
    tokens, types = _tokens(told, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = told["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for key, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{key}_token_id", None)
        if isinstance(number, int):
            add(number)
    opening = tokenizer("a").input_ids[0]
    writer.add_add_bos_token(opening == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def split_name(told: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer splits text. Raises `ModelError` where it has none."""
    model = told["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model.get("byte_fallback") else model.get("type")
        raise _unknown(f"is a {kind} tokenizer, no byte-level BPE")
    steps = _steps(told.get("pre_tokenizer"))
    split = [step for step in map(_split, steps) if step is not None]
    name = _SPLITS.get(tuple(split))
    if name is None or "ByteLevel" not in [step["type"] for step in steps]:
        raise _unknown(
            f"splits text by {split or steps!r}, and llama.cpp's name of that is unknown"
        )
    normalised = tuple(step["type"] for step in _steps(told.get("normalizer"), "normalizers"))
    if normalised not in ((), _NORMALISED.get(name, ())):
        raise _unknown(f"normalises text ({', '.join(normalised)}), which llama.cpp does not")
    return name


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("is a slow one without tokenizer.json")
    return json.loads(backend.to_str())


def _unknown(what: str) -> ModelError:
    return ModelError(
        f"the base's tokenizer {what}",
        "write the adapter alone (--adapter-only) for a GGUF file of the base that you have, or"
        " merge (`loralab merge`) and convert with llama.cpp's own convert_hf_to_gguf.py.",
    )


def _steps(part: Any, key: str = "pretokenizers") -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _split(step: dict[str, Any]) -> str | None:
    """How one step splits text; None for a byte-level step, whose own splitting is GPT-2's."""
    if step["type"] == "ByteLevel":
        return "a space in front" if step.get("add_prefix_space") else None
    if step["type"] == "Digits":
        return "digits" if step.get("individual_digits") else "numbers"
    if step["type"] == "Split" and "Regex" in step["pattern"]:
        return step["pattern"]["Regex"]
    return step["type"]


def _tokens(told: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Every token by its number, with its kind; numbers without one are unused."""
    named = {number: token for token, number in told["model"]["vocab"].items()}
    added = {token["id"]: token for token in told.get("added_tokens", [])}
    largest = 1 + max([*named, *added])
    if largest > vocab_size:
        raise ModelError(
            f"the base's tokenizer has {largest} tokens, the model {vocab_size}",
            "put the tokenizer that belongs to the model into its folder.",
        )
    tokens, types = [], []
    for number in range(vocab_size):
        if number in added:
            tokens.append(added[number]["content"])
            special = added[number]["special"]
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif number in named:
            tokens.append(named[number])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
    return tokens, types


def _known() -> str:
    return "llama.cpp's " + ", ".join(_SPLITS.values())
