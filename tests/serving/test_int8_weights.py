"""Decoding with int8 copies of the base: what they stand for, and what that costs."""

import copy
import ctypes
import json
import logging
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_models import (
    SIZES,
    build_model,
    host,
    needs_kernel,
    one_thread,
    runner_of,
    tokens,
    wanted,
)
from served_adapters import tokenizer
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import loralab
from loralab.adapters import Probe, merge_in_place, restore
from loralab.errors import AdapterError, ModelError
from loralab.measuring import log_likelihoods
from loralab.native import build, load_kernel
from loralab.serving.fast.kernel_step import KERNEL, KernelStep
from loralab.serving.fast.whole_numbers import WholeCopies
from loralab.serving.opening import ServeSettings, open_service
from loralab.serving.precision import precision_cost
from loralab.serving.runner import Chunk

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def linears(decoder: Any) -> list[list[Any]]:
    """All linear layers, those of one input together."""
    groups = []
    for block in decoder.blocks:
        q, k, v, output, gate, up, down = block.projections
        groups += [[q, k, v], [output], [gate, up], [down]]
    return [*groups, [decoder.output]]


def rounded_model(model: Any) -> Any:
    """The model with what its weights' int8 copies stand for in their place."""
    runner = runner_of(model, "kernel")
    groups = linears(runner.step.decoder)
    copies = WholeCopies().of([[layer.weight for layer in group] for group in groups])
    meant = {
        id(layer.weight): whole.weight()
        for group, wholes in zip(groups, copies, strict=True)
        for layer, whole in zip(group, wholes, strict=True)
    }
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
            if id(own) in meant:
                parameter.copy_(meant[id(own)])
    return other


@needs_kernel
@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral"])
def test_the_answers_are_those_of_what_the_copies_stand_for(kind: str) -> None:
    model = build_model(kind)
    if kind == "gemma":  # its output layer is its embedding, which is not rounded
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    oracle = rounded_model(model)
    for each in (model, oracle):
        host(each, "a", 1, rank=5)
        host(each, "b", 2, rank=8, targets=["q_proj", "up_proj", "down_proj"])
    runner = runner_of(model, "int8")
    assert isinstance(runner.step, KernelStep)
    text = tokens(70)
    for entry in (None, "a", {"a": 0.5, "b": -0.7}):
        found, exact = runner.all_logits(Chunk(0, text, 0, entry)), wanted(oracle, text, entry)
        error = (found - exact).norm() / exact.norm()
        assert error < 3e-4  # inputs have 16 bits
        assert (found - wanted(model, text, entry)).norm() / exact.norm() > 3 * error


@needs_kernel
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3"], ids=["SSE2", "AVX2"])
def test_other_processors_code_gives_the_same(flags: str, monkeypatch: Any) -> None:
    try:
        library = ctypes.CDLL(str(build(KERNEL, (flags, "-O0"))))
    except OSError as error:  # not this processor's
        pytest.skip(str(error))
    model = build_model(dtype=torch.bfloat16)
    host(model, "a", 1, rank=6)
    text = tokens(40)
    for step in ("kernel", "int8"):
        runner = runner_of(model, step)
        native = runner.all_logits(Chunk(0, text, 0, "a"))
        other = KernelStep(library, runner.step.decoder, 2, 100, runner.precision)
        monkeypatch.setattr(runner, "step", other)
        monkeypatch.setattr(runner, "_versions", {})
        runner.adapters_changed()
        found = runner.all_logits(Chunk(0, text, 0, "a"))
        assert (found - native).norm() < 0.02 * native.norm()  # bf16 is rounded at other places
        for n in (1, 2, 7, 40):
            assert torch.equal(runner.forward([Chunk(1, text[:n], 0, "a")])[0], found[n - 1])


def test_every_number_is_rounded_to_the_nearest_of_255() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 64, generator=draw), torch.randn(9, 64, generator=draw)]
    weights[0][:, 3] *= 30  # a large column
    weights[1][4] = 0
    before = [weight.clone() for weight in weights]
    first, second = WholeCopies().of([weights])[0]
    assert torch.equal(first.columns, second.columns)
    for weight, own, whole in zip(weights, before, (first, second), strict=True):
        assert torch.equal(weight, own)
        step = whole.rows[:, None] * whole.columns
        assert ((whole.weight() - weight).abs() <= 0.5001 * step).all()
        assert (whole.values.abs().amax(1)[weight.any(1)] == 127).all()
    assert not second.values[4].any()
    error = (first.weight() - weights[0]).norm()
    scale = weights[0].abs().amax(1, keepdim=True) / 127
    assert error < 0.7 * ((weights[0] / scale).round() * scale - weights[0]).norm()


@needs_kernel
def test_the_base_has_its_own_copies_again_after_a_merged_adapter() -> None:
    model, text = build_model(), tokens(20)
    host(model, "a", 1)
    runner = runner_of(model, "int8")
    base, apart = (runner.all_logits(Chunk(0, text, 0, entry)) for entry in (None, "a"))
    merge_in_place(model, "a")
    runner.adapters_changed()
    merged = runner.all_logits(Chunk(0, text, 0, "a"))
    assert (merged - apart).norm() < 0.1 * (apart - base).norm()
    restore(model)
    runner.adapters_changed()
    assert torch.equal(runner.all_logits(Chunk(0, text, 0, None)), base)
    assert torch.equal(runner.all_logits(Chunk(0, text, 0, "a")), apart)


@needs_kernel
def test_what_is_no_number_stays_none_and_stays_alone() -> None:
    model = build_model()
    runner = runner_of(model, "int8")
    chunks = [Chunk(0, tokens(5), 0), Chunk(1, [70], 0)]
    good = runner.forward(chunks)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[70] = torch.nan
    found = runner.forward(chunks)
    assert torch.equal(found[0], good)
    assert found[1].isnan().all()


@needs_kernel
def test_int8_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"int8 weights need the compiled kernel.*float16"):
        runner_of(build_model(dtype=torch.float16), "int8")
    monkeypatch.setenv("LORALAB_KERNELS", "off")
    load_kernel.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"(?s)there is none here.*\n.*--weights base"):
            runner_of(build_model(), "int8")
    finally:
        load_kernel.cache_clear()


@needs_kernel
def test_the_cost_is_measured_against_the_weights_as_they_are() -> None:
    model = build_model()
    oracle = rounded_model(model)
    host(model, "a", 1)
    host(oracle, "a", 1)
    runner = runner_of(model, "int8")
    exact = runner.in_base_precision(50)
    texts = [tokens(length, length) for length in (20, 35, 50)]
    none = precision_cost(exact, exact, texts)
    assert (none.nats, none.divergence, none.spread, none.agreement) == (0, 0, 0, 1)
    cost = precision_cost(exact, runner, texts, "a")
    lost, divergence = [], []
    for ids in texts:
        p, q = (wanted(m, ids, "a")[:-1].double().log_softmax(-1) for m in (model, oracle))
        chosen = torch.tensor(ids[1:])[:, None]
        lost.append((p.gather(1, chosen) - q.gather(1, chosen))[:, 0])
        divergence.append((p.exp() * (p - q)).sum(1))
    all_lost = torch.cat(lost)
    assert cost.num_tokens == len(all_lost) == 102
    assert cost.nats == pytest.approx(float(all_lost.mean()), abs=2e-4)
    assert cost.spread == pytest.approx(float(all_lost.square().mean().sqrt()), rel=0.05)
    assert cost.divergence == pytest.approx(float(torch.cat(divergence).mean()), rel=0.05)
    assert cost.standard_error > 0
    assert "nats a token on 102 tokens" in str(cost)
    with pytest.raises(ValueError, match="two of them"):
        precision_cost(exact, runner, texts[:1])


def served_llama() -> LlamaForCausalLM:
    """As wide as the kernel needs it, with the tokenizer's vocabulary."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(tokenizer()), "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1)).eval()


def write_adapter(folder: Path) -> None:
    """An adapter with probes of what the model in fp32 says with it."""
    model = served_llama()
    host(model, "made", 1)
    inputs = [tuple(range(5 + i, 40 + 5 * i, 2)) for i in range(3)]
    found = log_likelihoods(model, inputs, route="made")
    probes = tuple(Probe(ids, value) for ids, value in zip(inputs, found, strict=True))
    loralab.save_adapter(model, "made", folder, probes=probes)


@needs_kernel
def test_a_server_says_what_int8_costs_and_proves_adapters_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path / "good")
    write_adapter(tmp_path / "loud")
    told = tmp_path / "loud" / "adapter_config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "lora_alpha": 64}))
    settings = ServeSettings(
        base="tiny", max_batch_size=4, max_tokens=128, weights="int8", proofs=None
    )
    caplog.set_level(logging.INFO, logger="loralab")
    with open_service(served_llama(), tokenizer(), tmp_path, settings) as service:
        assert "weights in int8 cost" in caplog.text and "nats a token on" in caplog.text
        assert service.fingerprint.startswith("tiny-int8@")
        batch = service.engine._batch
        assert batch is not None and batch.merging is None  # merged weights would be rounded
        service.store.lease(["good"]).result(60).release()
        proof = next(e.proof for e in service.store.describe() if e.name == "good")
        assert proof is not None and proof.state == "proved"
        with pytest.raises(AdapterError, match="wrong scale"):
            service.store.lease(["loud"]).result(60)


def test_a_model_that_writes_no_text_is_not_served_in_int8(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    settings = ServeSettings(base="tiny", max_tokens=64, weights="int8", proofs=None)
    with (
        pytest.raises(ModelError, match=r"tiny writes no text.*int8"),
        open_service(BertForSequenceClassification(config).eval(), tokenizer(), None, settings),
    ):
        pass
