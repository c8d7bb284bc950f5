"""Tiny random decoders that the fast runner covers, adapters on them, their own answers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loralab.adapters import LoRAConfig, attach, use
from loralab.native import NoKernelError, find_compiler
from loralab.serving.fast import FastRunner, fast_runner
from loralab.serving.fast.decoder import find_decoder
from loralab.serving.fast.steps import TorchStep
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.runner import Runner

SIZES: dict[str, Any] = {
    "vocab_size": 75,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
}
NUM_SLOTS, MAX_TOKENS = 6, 200


def has_compiler() -> bool:
    try:
        find_compiler()
    except NoKernelError:
        return False
    return True


needs_kernel = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler is installed")
STEPS = ["torch", pytest.param("kernel", marks=needs_kernel)]


def build_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        case "gemma":
            model = GemmaForCausalLM(GemmaConfig(**SIZES))
        case _:
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def host(model: Any, name: str, seed: int = 0, **changes: Any) -> None:
    attach(model, LoRAConfig(**{"rank": 8, **changes}), name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if path.endswith(f".adapters.{name}.B"):
            parameter.data.normal_(std=0.3, generator=generator)


def runner_of(model: Any, step: str) -> Any:
    """step: "torch", "kernel", or "int8", the kernel with int8 weights."""

    def plain() -> Runner:
        return PlainRunner(model, num_slots=NUM_SLOTS, max_tokens=MAX_TOKENS)

    sizes = {"num_slots": NUM_SLOTS, "max_tokens": MAX_TOKENS}
    if step != "torch":
        return fast_runner(model, plain, precision="int8" if step == "int8" else "base", **sizes)
    model.requires_grad_(False)
    decoder = find_decoder(model, MAX_TOKENS)
    assert not isinstance(decoder, str), decoder
    torch_step = TorchStep(decoder, NUM_SLOTS, MAX_TOKENS)
    return FastRunner(model, decoder, torch_step, plain, NUM_SLOTS, MAX_TOKENS)


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (count,), generator=generator).tolist()


@torch.no_grad()
def wanted(model: Any, ids: list[int], entry: Any) -> torch.Tensor:
    with use(model, entry):
        return model(input_ids=torch.tensor([ids])).logits[0].float()


ENTRIES: list[Any] = [None, "a", {"b": 0.5, "c": -0.3}, "c", "b"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
