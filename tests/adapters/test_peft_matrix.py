"""What PEFT writes we read and the reverse, over architectures and settings: same logits, same
gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_reads, peft_runs, peft_writes, shake
from torch import nn
from zoo import MODELS, build, inputs, logits

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    count_parameters,
    load_adapter,
    save_adapter,
    use,
)

# per model: two target suffixes, an expression, the embedding, a module to train whole
NAMES: dict[str, tuple[list[str], str, str | None, str]] = {
    "llama": (["q_proj", "down_proj"], r".*layers\.1\..*_proj", "embed_tokens", "norm"),
    "qwen2": (["v_proj", "up_proj"], r".*\.self_attn\.(k|o)_proj", "embed_tokens", "score"),
    "mistral": (["k_proj", "gate_proj"], r".*layers\.0\..*_proj", "embed_tokens", "lm_head"),
    "gpt2": (["c_attn", "c_fc"], r"transformer\.h\.1\..*c_proj", "wte", "ln_f"),
    "bert": (["query", "output.dense"], r".*layer\.0\..*dense", "word_embeddings", "classifier"),
    "t5": (["q", "wi"], r"encoder\..*\.(k|v|wo)", "embed_tokens", "final_layer_norm"),
    "vit": (["q_proj", "fc1"], r".*layers\.1\..*_proj", None, "classifier"),
    "convnet": (["first", "line"], r"second|cube", None, "norm"),
    "perceptron": (["0", "3"], r"layers\.(0|3)", "table", "classifier"),
}
SETTINGS = [
    "plain",
    "rslora",
    "patterns",
    "dora",
    "embeddings",
    "tokens",
    "whole",
    "lora_only",
    "all",
    "regex",
]


def _table(model: str) -> str:
    return "shared" if model == "t5" else str(NAMES[model][2])


def peft_settings(model: str, setting: str) -> dict[str, Any]:
    targets, expression, embedding, whole = NAMES[model]
    common: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    return (
        common
        | {
            "plain": {},
            "rslora": {"use_rslora": True},
            "patterns": {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[1]: 3}},
            "dora": {"use_dora": True},
            "embeddings": {"target_modules": [*targets, embedding]},
            "tokens": {"trainable_token_indices": {_table(model): [3, 7, 1]}},
            "whole": {"modules_to_save": [whole]},
            "lora_only": {"bias": "lora_only"},
            "all": {"bias": "all"},
            "regex": {"target_modules": expression},
        }[setting]
    )


def our_settings(model: str, setting: str) -> LoRAConfig:
    targets, expression, embedding, whole = NAMES[model]
    common: dict[str, Any] = {"rank": 4, "alpha": 6.0, "targets": targets}
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"scaling": "alpha/sqrt(rank)"},
        "patterns": {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[1]: 3.0}},
        "dora": {"dora": True},
        "embeddings": {"targets": [*targets, embedding]},
        "tokens": {"token_rows": {_table(model): [3, 7, 1]}},
        "whole": {"whole_modules": [whole]},
        "lora_only": {"biases": "targets"},
        "all": {"biases": "all"},
        "regex": {"targets": expression},
    }
    return LoRAConfig(**(common | changes[setting]))


CASES = [
    pytest.param(model, setting, id=f"{model}-{setting}")
    for model in MODELS
    for setting in SETTINGS
    if not (setting in ("embeddings", "tokens") and NAMES[model][2] is None)
]


def gradients(output: torch.Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    found = torch.autograd.grad(
        (output * weights).sum(), list(parameters.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(parameters[name]) if grad is None else grad
        for name, grad in zip(parameters, found, strict=True)
    }


@pytest.mark.parametrize(("model", "setting"), CASES)
def test_we_read_what_peft_writes(model: str, setting: str, tmp_path: Path) -> None:
    base, batch = build(model), inputs(model)
    theirs = peft_writes(base, tmp_path, **peft_settings(model, setting))
    expected = logits(peft_runs(theirs, **batch))
    load_adapter(base, tmp_path)
    with use(base, "default"):
        ours = logits(base(**batch))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    _compare_gradients(ours, adapter_parameters(base, "default"), expected, theirs)


def _compare_gradients(
    ours: torch.Tensor,
    parameters: dict[str, nn.Parameter],
    expected: torch.Tensor,
    theirs: nn.Module,
) -> None:
    mine = gradients(ours, {n: p for n, p in parameters.items() if n.endswith((".A", ".B"))})
    names = {
        ".A": ("lora_A.default.weight", "lora_embedding_A.default"),
        ".B": ("lora_B.default.weight", "lora_embedding_B.default"),
    }
    their_parameters = dict(theirs.named_parameters())
    for name, gradient in mine.items():
        module, end = name[: -len(".adapters.default.A")], name[-2:]
        keys = [f"base_model.model.{module}.{key}" for key in names[end]]
        parameter = next(their_parameters[key] for key in keys if key in their_parameters)
        (their,) = torch.autograd.grad(
            (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum(),
            [parameter],
            retain_graph=True,
        )
        torch.testing.assert_close(gradient, their.flatten(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("model", "setting"), CASES)
def test_peft_reads_what_we_write(model: str, setting: str, tmp_path: Path) -> None:
    base, batch = build(model), inputs(model)
    ours = copy.deepcopy(base)
    attach(ours, our_settings(model, setting), seed=1)
    shake(adapter_parameters(ours, "default").values())
    with use(ours, "default"):
        expected = logits(ours(**batch))
    assert not torch.allclose(expected, logits(base(**batch)), atol=1e-6)
    save_adapter(ours, "default", tmp_path / "ours")
    theirs = peft_reads(base, tmp_path / "ours", trainable=True)
    torch.testing.assert_close(logits(peft_runs(theirs, **batch)), expected, atol=1e-5, rtol=1e-5)
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count_parameters(ours)[0] == trainable
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    with use(again, "default"):
        assert torch.equal(logits(again(**batch)), expected)
