"""A server's pair with the base left to its files: its bytes come back, and none are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import shake
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.adapters import LoRAConfig, adapter_parameters, attach, merge_in_place, restore, use
from loralab.errors import ModelError

WEIGHTS = "model.safetensors"


def hosting(folder: Path, dtype: torch.dtype, **settings: Any) -> LlamaForCausalLM:
    """A model loaded from the folder, with two adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for seed, name in enumerate("ab"):
        attach(model, LoRAConfig(rank=2, **settings), name)
        shake(adapter_parameters(model, name).values(), seed)
    return model


def base_bytes(model: LlamaForCausalLM) -> dict[str, bytes]:
    return {
        name: parameter.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
        if ".adapters." not in name
    }


def kept_bytes(model: LlamaForCausalLM) -> int:
    state = model.__dict__["_loralab_merged"][1]
    return sum(tensor.numel() for tensor in state.kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_files_bytes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = hosting(tmp_path, dtype, whole_modules=["norm"])
    before, ids = base_bytes(model), torch.tensor([[3, 5, 8]])
    for turn in range(6):
        name = "ab"[turn % 2]
        with use(model, name), torch.no_grad():
            separate = model(ids).logits
        merge_in_place(model, name, base_folder=tmp_path)
        assert kept_bytes(model) == 0
        with torch.no_grad():
            assert torch.allclose(
                model(ids).logits, separate, atol=1e-5 if dtype.itemsize > 2 else 1
            )
        restore(model)
        assert base_bytes(model) == before
        with use(model, name), torch.no_grad():
            assert torch.equal(model(ids).logits, separate)


def test_a_tie_is_tied_again_and_its_tensor_is_kept(tmp_path: Path) -> None:
    model = hosting(tmp_path, torch.float32, targets=["lm_head", "q_proj"])
    before = base_bytes(model)
    merge_in_place(model, "a", base_folder=tmp_path)
    assert kept_bytes(model) == 40 * 16  # the embedding still uses it
    assert torch.equal(
        model.model.embed_tokens.weight, load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    )
    restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert base_bytes(model) == before


def test_a_folder_of_another_base_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = hosting(tmp_path, torch.float32)
    before = base_bytes(model)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-6

    _rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=r"not hold this model bit for bit: 'model\.layers\.0"):
        merge_in_place(model, "a", base_folder=tmp_path)
    assert base_bytes(model) == before
    assert "_loralab_merged" not in model.__dict__


def test_files_that_changed_meanwhile_are_refused_and_the_adapter_stays(tmp_path: Path) -> None:
    model, ids = hosting(tmp_path, torch.float32), torch.tensor([[3, 5, 8]])
    merge_in_place(model, "a", base_folder=tmp_path)
    merged = model(ids).logits
    good = (tmp_path / WEIGHTS).read_bytes()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1

    _rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=r"has changed since.*'model\.layers\.1\.mlp\.up_proj"):
        restore(model)
    assert torch.equal(model(ids).logits, merged)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="bring it back"):
        restore(model)
    (tmp_path / WEIGHTS).write_bytes(good)
    restore(model)
    with use(model, "a"):
        torch.testing.assert_close(model(ids).logits, merged, atol=1e-5, rtol=1e-5)


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
