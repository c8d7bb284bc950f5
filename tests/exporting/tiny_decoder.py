"""A tiny random decoder with a byte-level BPE tokenizer, saved as a transformers folder."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it rests for 12 or 13 hours.",
    "A model is frozen and hosts many adapters at once; a route says who uses which.",
    "Questions about the weather: will it rain tomorrow? It's hard to say, isn't it?",
] * 3
TEXTS = ("The lazy fox, it's 2026!", "Will the model say\nwhich adapter it uses?  Café")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(split: Any = None, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few sentences; split: what comes before it."""
    made = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [byte_level] if split is None else [split, byte_level]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def save_decoder(
    folder: Path, kind: type = LlamaForCausalLM, words: Any = None, **changes: Any
) -> Path:
    """Two blocks of random weights; grouped queries, large enough to tell tokens apart."""
    words = words or tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    kind(kind.config_class(**settings)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


__all__ = ["CHATML", "TEXTS", "LlamaConfig", "save_decoder", "tokenizer"]
