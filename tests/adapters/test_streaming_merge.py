"""A checkpoint merged on disk is the model merged in memory, with a bound on memory."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    merge,
    merge_checkpoint,
    save_adapter,
    save_merged,
    use,
)
from loralab.errors import AdapterError, ModelError, OutputError


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    ).eval()


def attach_random(model: nn.Module, **config) -> None:
    attach(model, LoRAConfig(rank=4, **config), "a")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "a").values():
            parameter += 0.1 * torch.randn_like(parameter)


CASES = {
    "linears": (llama, {}),
    "embedding": (llama, {"targets": ("embed_tokens", "lm_head")}),
    "dora": (llama, {"dora": True, "targets": ("embed_tokens", "o_proj")}),
    "rows and whole": (
        lambda: llama(tie_word_embeddings=True),
        {"token_rows": {"embed_tokens": [3, 9]}, "whole_modules": ("norm",)},
    ),
    "transposed": (gpt2, {"biases": "targets"}),
}


@pytest.mark.parametrize("block", [100, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_disk_is_what_in_memory_is(case, dtype, block, tmp_path, monkeypatch):
    monkeypatch.setattr("loralab.adapters.streaming_merge.BLOCK_ELEMENTS", block)
    make, config = CASES[case]
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    before = {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir()}
    attach_random(model, **config)
    save_adapter(model, "a", tmp_path / "adapter")
    told = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, certificate = merge(model, "a")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(
            found[name], tensor, rtol=0, atol=1e-6 if dtype.itemsize > 2 else 0.01
        )
        close = (found[name] == tensor).float().mean()  # a block's sum may round elsewhere
        assert dtype.itemsize > 2 or close > 0.995, name
    assert told.relative_error == pytest.approx(certificate.relative_error, rel=0.05, abs=1e-6)
    assert told.num_weights == certificate.num_weights
    assert told.adapter_sha256 == certificate.adapter_sha256
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir()}
    kept = {f.name for f in (tmp_path / "out").iterdir()}
    assert kept == {*before, "merge_certificate.json", "README.md"}
    assert json.loads((tmp_path / "out" / "merge_certificate.json").read_text()) == told.to_dict()


def test_everything_that_does_not_fit_is_named_and_nothing_is_left(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    wide = llama(hidden_size=40, num_hidden_layers=3)
    attach_random(wide, targets=("q_proj",), whole_modules=("lm_head",))
    save_adapter(wide, "a", tmp_path / "wide")
    with pytest.raises(AdapterError) as raised:
        merge_checkpoint(tmp_path / "base", tmp_path / "wide", tmp_path / "out")
    for words in (
        "q_proj.weight: delta of (40, 40), weight of (32, 32)",
        "model.layers.2.self_attn.q_proj: the model has no such module",
        "lm_head.weight: (64, 40), in the checkpoint F32 (64, 32)",
    ):
        assert words in raised.value.cause
    small = llama().bfloat16()
    small.save_pretrained(tmp_path / "small")
    attach(small, LoRAConfig(rank=2), "a")
    with torch.no_grad():
        for name, parameter in adapter_parameters(small, "a").items():
            parameter += 1e-6 * name.endswith(".B")
    save_adapter(small, "a", tmp_path / "tiny")
    with pytest.raises(AdapterError, match="merging in bfloat16 would lose"):
        merge_checkpoint(tmp_path / "small", tmp_path / "tiny", tmp_path / "out")
    assert {f.name for f in tmp_path.iterdir()} == {"base", "wide", "small", "tiny"}
    forced = merge_checkpoint(tmp_path / "small", tmp_path / "tiny", tmp_path / "out", force=True)
    assert forced.forced
    with pytest.raises(OutputError, match="out exists already"):
        merge_checkpoint(tmp_path / "small", tmp_path / "tiny", tmp_path / "out")


TIES = {
    "input side": {"targets": ("embed_tokens", "q_proj")},
    "output side": {"targets": ("lm_head",)},
    "both": {"targets": ("embed_tokens", "lm_head")},
    "output whole": {"targets": ("q_proj",), "whole_modules": ("lm_head",)},
    "rows and all": {"targets": ("q_proj",), "token_rows": {"embed_tokens": [3, 9]}},
}


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
@pytest.mark.parametrize("case", TIES)
def test_a_tie_is_cut_where_a_side_changes(case, shards, tmp_path):
    model = llama(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size=shards)
    attach_random(model, **TIES[case])
    save_adapter(model, "a", tmp_path / "adapter")
    told = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, certificate = merge(model, "a")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, tensor in merged.state_dict().items():
        assert (found.state_dict()[name] == tensor).float().mean() > 0.995, name
    assert told.num_weights == certificate.num_weights
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == (case == "rows and all")


def test_a_head_that_the_checkpoint_lacks_is_added(tmp_path):
    torch.manual_seed(1)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    attach_random(model, whole_modules=("score",))
    save_adapter(model, "a", tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, _ = merge(model.eval(), "a")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert found.config.num_labels == 5
    ids = torch.tensor([[3, 5, 8]])
    torch.testing.assert_close(found(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def test_a_head_without_all_of_its_weights_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification(BertConfig(hidden_size=24, num_hidden_layers=1))
    attach_random(model, targets=(), whole_modules=("classifier",))
    save_adapter(model, "a", tmp_path / "adapter")
    with pytest.raises((AdapterError, ModelError)):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["memory", "disk"])
def test_a_tie_that_no_setting_cuts_is_cut_by_the_file(way, tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    attach_random(model, targets=("decoder.embed_tokens", "lm_head", "q"))
    save_adapter(model, "a", tmp_path / "adapter")
    merged, certificate = merge(model, "a")
    if way == "memory":
        save_merged(merged, certificate, tmp_path / "out")
    else:
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[3, 5, 8]])
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with use(model, "a"):
        expected = model(**batch).logits
    for logits in (merged(**batch).logits, found(**batch).logits):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_damaged_checkpoints_are_named(tmp_path):
    model = llama()
    attach_random(model)
    save_adapter(model, "a", tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    with pytest.raises(ModelError, match="holds no safetensors checkpoint"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    llama().save_pretrained(base)
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for damaged, words in (
        (whole[:-100], r"is damaged in its header: its tensors take \d+ bytes"),
        (whole[:50], "is damaged in the length of its header"),
        (whole[:8] + b"!" + whole[9:], "is damaged in its header"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=words):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    file.write_bytes(whole)
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json names no model that can be built"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


MERGE = """
import sys, torch
from loralab.adapters import merge_checkpoint
import transformers
transformers.AutoConfig
print("ready", flush=True)
sys.stdin.readline()
merge_checkpoint(*sys.argv[1:4])
"""


@pytest.mark.slow
def test_memory_is_the_largest_shard_and_a_gibibyte(tmp_path):
    """3 GiB of bf16 in shards of 0.5 GiB, one of them a single embedding."""
    config = LlamaConfig(
        vocab_size=128_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    base = tmp_path / "base"
    base.mkdir()
    config.save_pretrained(base)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(t.numel() for t in shards[-1].values()) + parameter.numel() > 1 << 28:
            shards.append({})
        shards[-1][name] = torch.full(parameter.shape, 0.01, dtype=torch.bfloat16)
    for index, shard in enumerate(shards):
        save_file(shard, base / f"model-{index:05d}.safetensors")
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    shards.clear()
    attach(model, LoRAConfig(rank=8), "a")
    adapter = {
        name: torch.full(p.shape, 0.01) for name, p in adapter_parameters(model, "a").items()
    }
    from loralab.adapters import Adapter, write_adapter

    pairs = {
        name.removesuffix(".adapters.a.A"): (A, adapter[name.removesuffix(".A") + ".B"])
        for name, A in adapter.items()
        if name.endswith(".A")
    }
    write_adapter(Adapter(LoRAConfig(rank=8), pairs), tmp_path / "adapter")
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE, base, tmp_path / "adapter", tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    before, peak = _resident(process.pid), [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], _resident(process.pid))
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    process.communicate("go\n")
    thread.join()
    assert process.returncode == 0
    assert total > 2 * largest
    assert peak[0] - before < largest + (1 << 30)
    first = load_file(tmp_path / "out" / "model-00001.safetensors")
    assert any((tensor != 0.01).any() for tensor in first.values())


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
