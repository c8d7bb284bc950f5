"""Probes: what an adapted model said, and the proof that it says it still."""

import math

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from loralab.adapters import LoRAConfig, Probe, adapter_parameters, attach, use
from loralab.data import Encoded
from loralab.errors import AdapterError
from loralab.measuring import check_probes, log_likelihoods, make_probes
from loralab.models import build_model

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
BERT = BertConfig(**SIZES, num_attention_heads=2)
ROWS = [
    Encoded(id=f"r{i}", group=f"r{i}", input_ids=tuple(range(3 + i % 7, 12 + i)), label=0)
    for i in range(30)
]


def adapted(task: str):
    model = build_model(LLAMA if task == "causal" else BERT, task=task, device="cpu", seed=1)
    attach(model, LoRAConfig(rank=2), "tuned", head="frozen")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "tuned").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_a_causal_probe_is_the_log_likelihood_of_its_tokens():
    model, ids = adapted("causal"), (5, 9, 9, 40)
    (found,) = log_likelihoods(model, [ids], route="tuned")
    with torch.no_grad(), use(model, "tuned"):
        chances = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    expected = sum(math.log(chances[i, ids[i + 1]]) for i in range(3))
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_classifiers_probe_is_that_of_its_likeliest_class():
    model, ids = adapted("classification"), (5, 9, 9, 40)
    (found,) = log_likelihoods(model, [ids], route="tuned")
    with torch.no_grad(), use(model, "tuned"):
        chances = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    assert found == pytest.approx(math.log(max(chances.tolist())), abs=1e-6)


@pytest.mark.parametrize("task", ["causal", "classification"])
def test_probes_prove_that_an_adapter_is_applied(task):
    model = adapted(task)
    model.train()
    probes = make_probes(model, ROWS, route="tuned", count=8)
    assert model.training
    assert [p.input_ids for p in make_probes(model, ROWS[::-1], route="tuned", count=8)] == [
        p.input_ids for p in probes
    ]
    check = check_probes(model, probes, "tuned")
    assert check.largest_error == 0
    assert check.applied_share == 1
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "tuned").items():
            if name.endswith(".B"):
                parameter.zero_()
    with pytest.raises(AdapterError, match=r"'tuned' is loaded, but on its 8 probes.*\(0% of"):
        check_probes(model, probes, "tuned")


def test_probes_of_an_adapter_without_effect_prove_nothing():
    model = adapted("causal")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "tuned").values():
            parameter.zero_()
    probes = make_probes(model, ROWS, route="tuned", count=3)
    assert check_probes(model, probes, "tuned").applied_share is None


def test_rows_are_cut_and_single_tokens_left_out():
    model = adapted("causal")
    rows = [
        Encoded(id="long", group="long", input_ids=tuple([7] * 300), targets=tuple([7] * 300)),
        Encoded(id="one", group="one", input_ids=(7,), targets=(7,)),
    ]
    (probe,) = make_probes(model, rows, route="tuned")
    assert isinstance(probe, Probe)
    assert len(probe.input_ids) == 256
