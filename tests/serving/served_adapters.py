"""A tiny Llama, a tokenizer for it, and folders of adapters with effects that can be seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import loralab
from loralab.adapters import Probe
from loralab.measuring import log_likelihoods
from loralab.models import build_model
from loralab.serving.engine import Engine
from loralab.serving.place import EnginePlace
from loralab.serving.plain_runner import PlainRunner

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
PROMPTS = ((9, 8, 7, 6, 20), (30, 12, 40))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<|end|>", chat_template=CHAT
    )


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two blocks, width 16, a vocabulary of bytes."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return build_model(config, task="causal", device="cpu", seed=seed, **changes)


def write_adapter_folder(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float | int = 8.0,
    effect: float = 0.3,
    probes: bool = True,
    base_seed: int = 0,
    scaling: Any = "alpha/rank",
) -> Path:
    """An adapter whose A and B are random, in a folder as `train` writes it."""
    model = llama(base_seed)
    config = loralab.LoRAConfig(rank=rank, alpha=alpha, targets="all-linear", scaling=scaling)
    loralab.attach(model, config, "made", seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("adapters.made.B"):
            parameter.data.copy_(effect * torch.randn(parameter.shape, generator=draw))
    stored: tuple[Probe, ...] = ()
    if probes:
        inputs = [tuple(range(5 + i, 17 + 3 * i, 2)) for i in range(3)]
        found = log_likelihoods(model, inputs, route="made")
        stored = tuple(Probe(ids, value) for ids, value in zip(inputs, found, strict=True))
    loralab.save_adapter(model, "made", folder, probes=stored)
    return folder


@contextmanager
def running(model: PreTrainedModel, **settings: Any) -> Iterator[Engine]:
    """An engine on the plain runner, started, and closed at the end."""
    runner = PlainRunner(model, num_slots=8, max_tokens=128)
    engine = Engine(runner, tokenizer(), **settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.close(drain=False)


def place(engine: Engine, model: PreTrainedModel, **settings: Any) -> EnginePlace:
    """Where a store puts adapters, with prompts of token ids."""
    return EnginePlace(engine, model, prompts=PROMPTS, **settings)
