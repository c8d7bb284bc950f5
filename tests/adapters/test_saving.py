"""Adapters on disk: identity, the base they belong to, what is checked on loading."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft_oracle import peft_reads, peft_runs, peft_writes, shake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from zoo import build, inputs, logits

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    content_hash,
    extract,
    hosted,
    load_adapter,
    read_adapter,
    save_adapter,
    use,
    write_adapter,
)
from loralab.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"


def trained(name: str = "llama", **changes: object) -> nn.Module:
    model = build(name)
    attach(model, LoRAConfig(**({"rank": 4, "alpha": 8.0} | changes)))  # pyright: ignore
    shake(adapter_parameters(model, "default").values())
    return model


def test_the_content_hash_knows_content_alone(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, "default", tmp_path)
    identity = content_hash(extract(model, "default"))
    assert content_hash(read_adapter(tmp_path)) == identity
    found = load_file(tmp_path / WEIGHTS)
    backwards = dict(sorted(found.items(), reverse=True))
    save_file(backwards, tmp_path / WEIGHTS, metadata={"format": "pt", "other": "words"})
    assert content_hash(read_adapter(tmp_path)) == identity
    next(iter(found.values())).view(-1)[0] += 1e-3
    save_file(found, tmp_path / WEIGHTS)
    assert content_hash(read_adapter(tmp_path)) != identity


def test_another_alpha_is_another_adapter() -> None:
    hashes = {content_hash(extract(trained(alpha=alpha), "default")) for alpha in (8.0, 9.0)}
    assert len(hashes) == 2


def test_a_wrong_base_is_recognised(tmp_path: Path) -> None:
    save_adapter(trained(), "default", tmp_path)
    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    with pytest.raises(AdapterError, match=r"another base: of 20 parameters 20 of other values"):
        load_adapter(other, tmp_path)
    assert hosted(other) == ()
    load_adapter(other, tmp_path, check_base=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_lower_precision_is_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(trained(), "default", tmp_path)
    load_adapter(build("llama").to(dtype), tmp_path)


def test_a_new_head_and_new_tokens_do_not_change_the_base(tmp_path: Path) -> None:
    save_adapter(trained("qwen2"), "default", tmp_path)
    other = build("qwen2")
    with torch.no_grad():
        other.score.weight.add_(1)  # pyright: ignore
    other.resize_token_embeddings(48)  # pyright: ignore
    load_adapter(other, tmp_path)


def test_all_that_does_not_fit_comes_in_one_error(tmp_path: Path) -> None:
    save_adapter(trained(whole_modules=["norm"]), "default", tmp_path)
    config = copy.deepcopy(build("llama").config)
    config.num_hidden_layers, config.hidden_size = 1, 8  # pyright: ignore
    smaller = LlamaForCausalLM(config)  # pyright: ignore
    with pytest.raises(AdapterError) as caught:
        load_adapter(smaller, tmp_path)
    for words in ("layers.1.self_attn.q_proj: the model has no such module", "delta of 16 x 16"):
        assert words in str(caught.value)
    assert hosted(smaller) == ()


def test_the_classification_head_travels_to_peft(tmp_path: Path) -> None:
    base, batch = build("qwen2"), inputs("qwen2")
    model = trained("qwen2", whole_modules=["score"])
    save_adapter(model, "default", tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["task_type"] == "SEQ_CLS" and raw["modules_to_save"] == ["score"]
    assert (
        raw["target_modules"] == sorted(raw["target_modules"]) and "q_proj" in raw["target_modules"]
    )
    theirs = peft_reads(base, tmp_path)
    with use(model, "default"):
        expected = logits(model(**batch))
    torch.testing.assert_close(logits(peft_runs(theirs, **batch)), expected, atol=1e-5, rtol=1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def test_packed_attention_both_ways(tmp_path: Path) -> None:
    base, x = Block().eval(), torch.randn(2, 5, 8)
    theirs = peft_writes(base, tmp_path / "theirs", r=2, target_modules=["attention", "linear"])
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    with use(model, "default"):
        torch.testing.assert_close(model(x), peft_runs(theirs, x), atol=1e-5, rtol=1e-5)
        save_adapter(model, "default", tmp_path / "ours")
        torch.testing.assert_close(
            model(x), peft_runs(peft_reads(base, tmp_path / "ours"), x), atol=1e-5, rtol=1e-5
        )


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    adapter = extract(trained(), "default")
    write_adapter(adapter, tmp_path)
    write_adapter(adapter, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
    ]
