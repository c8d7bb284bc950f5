"""Numbers and exchanges that others can check: the seed experiment's counts, PEFT's reading."""

import warnings

import pytest
from peft import PeftModel

from loralab.adapters import LoRAConfig, adapter_parameters, attach, count_parameters
from loralab.config import MethodSection, TrainingSection
from loralab.models import build_model
from loralab.runs.evaluate import score
from loralab.runs.train import train
from loralab.runs.workbench import base_model, open_workbench
from loralab.training import prepare

pytestmark = pytest.mark.xdist_group("promises")  # one worker makes what its tests share

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def size(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


@pytest.fixture(scope="module")
def llama():
    return lambda: build_model("llama-3.2-1b", num_labels=2, head_bias=True)


def test_the_seeds_model_has_its_parameters(llama):
    assert count_parameters(llama())[1] == 1_235_818_498


def test_the_seeds_adapter_has_its_parameters(llama):
    model = llama()
    config = LoRAConfig(rank=16, alpha=32, targets=SEVEN, whole_modules=("score",))
    attach(model, config, name="seed")
    trained = adapter_parameters(model, "seed")
    head = {name: p for name, p in trained.items() if name.startswith("score")}
    assert size(trained) - size(head) == 11_272_192
    assert size(trained) == 11_276_290


def test_all_linears_of_the_seeds_model_are_its_seven(llama):
    model = llama()
    attach(model, LoRAConfig(rank=16, whole_modules=("score",)), name="all")
    assert size(adapter_parameters(model, "all")) == 11_276_290


@pytest.mark.parametrize(
    ("targets", "count"), [(("q_proj", "v_proj"), 18_874_368), (("q_proj",), 9_437_184)]
)
def test_the_tenthousandfold_of_gpt3(targets, count):
    model = build_model("gpt-3-175b", task="causal")
    attach(model, LoRAConfig(rank=4, targets=targets), name="paper")
    assert size(adapter_parameters(model, "paper")) == count


def test_the_seeds_baseline_trains_its_embedding():
    """12 of 16 layers frozen, the embedding not: on a small model of the same make."""
    facts = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    counts = {}
    for freeze in (True, False):
        model = build_model(facts, num_labels=2, head_bias=True, device="cpu")
        method = MethodSection(kind="frozen", frozen_layers=3, freeze_embedding=freeze)
        trainable = prepare(model, method, TrainingSection(device="cpu"), task="classification")
        counts[freeze] = trainable.num_trainable
    assert counts[False] - counts[True] == 40 * 16


def test_peft_reads_a_trained_adapter_with_equal_logits_and_accuracy(settings, tmp_path):
    config = settings(method__dropout=0.1)
    run = train(config, tmp_path / "run")
    bench = open_workbench(config, lambda _event: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an old name
        theirs = PeftModel.from_pretrained(base_model(config), str(run.artifact)).eval()
    rows, figures = score(theirs, None, bench.rows["test"], config)
    mine = run.metrics("test")["metrics"]
    assert figures["metrics"]["accuracy"] == mine["accuracy"]
    assert figures["metrics"]["nll"]["mean"] == pytest.approx(mine["nll"]["mean"], rel=1e-5)
    for own, other in zip(run.predictions("test"), rows, strict=True):
        assert other["prediction"] == own["prediction"]
        assert other["probabilities"] == pytest.approx(own["probabilities"], abs=1e-5)
