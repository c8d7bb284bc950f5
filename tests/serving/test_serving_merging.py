"""Merged weights answer as the adapter beside them, and the base comes back bit for bit."""

import random
from pathlib import Path

import pytest
import torch
from serving_models import PeftOracle, answer, ask, byte_tokenizer, finish, peft_adapter, tiny_llama

import loralab
from loralab.serving.engine import Engine
from loralab.serving.merged import MergedMode, rounding_loss
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.policy import MergePolicy

TOKENIZER = byte_tokenizer()
FULL = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("hot", "cold")}
    for seed, folder in enumerate(made.values()):
        peft_adapter(tiny_llama(), folder, 2, 3 * seed)
    return made


@pytest.fixture
def model(folders: dict[str, Path]) -> torch.nn.Module:
    model = tiny_llama()
    for name, folder in folders.items():
        loralab.load_adapter(model, folder, name=name)
    return model


def engine_of(model, **settings) -> Engine:
    merging = MergedMode(model, **settings)
    runner = PlainRunner(model, num_slots=4, max_tokens=128)
    return Engine(runner, TOKENIZER, merging=merging)


def bits(model) -> dict[str, bytes]:
    return {
        name: tensor.detach().numpy().tobytes()
        for name, tensor in loralab.adapters.hosting.plain_tensors(model).items()
    }


def test_one_hot_adapter_is_merged_and_set_apart_without_dropping_requests(model, folders):
    before = bits(model)
    oracle = PeftOracle(tiny_llama(), folders)
    engine = engine_of(model, policy=MergePolicy(saving=1.0, cost_seconds=0.0))
    hot = [ask(engine, prompt, "hot", **FULL) for prompt in ("one", "two", "three")]
    engine.step()
    engine.step()
    assert engine.stats()["merged"] == "hot"
    assert bits(model) != before
    cold = ask(engine, "four", "cold", **FULL)  # does not wait for the others
    engine.step()
    assert engine.stats()["merged"] is None
    assert len(cold.tokens) == 1
    finish(engine)
    for prompt, receiver in zip(("one", "two", "three"), hot, strict=True):
        oracle.assert_greedy(list(prompt.encode()), "hot", receiver.tokens)
    oracle.assert_greedy(list(b"four"), "cold", cold.tokens)
    restored = engine.call(lambda: bits(model) == before)
    finish(engine)
    assert restored.result(timeout=0)


def test_the_adapter_named_first_is_merged_at_once(model, folders):
    engine = engine_of(model, first="hot")
    receiver = answer(engine, "hello", "hot", **FULL)
    assert engine.stats()["switches"] == 1
    PeftOracle(tiny_llama(), folders).assert_greedy(list(b"hello"), "hot", receiver.tokens)
    base = answer(engine, "hello", None, **FULL)
    assert engine.stats()["merged"] is None
    assert base.tokens == answer(engine, "hello", None, **FULL).tokens


def test_closing_and_calls_find_the_base_itself(model):
    before = bits(model)
    engine = engine_of(model, first="hot")
    answer(engine, "hello", "hot", **FULL)
    assert bits(model) != before
    found = engine.call(lambda: bits(model) == before)
    finish(engine)
    assert found.result(timeout=0)
    engine.start()
    engine.close()
    assert bits(model) == before


def test_prefixes_of_merged_weights_are_kept_apart(model):
    engine = engine_of(model, first="hot")
    prompt = "the same words for everybody who asks here"
    for _ in range(2):  # the second goes on from what merged weights made
        answer(engine, prompt, "hot", **FULL)
    first = engine.stats()
    assert first["prefix_hits"] == 1
    engine.call(lambda: None)
    answer(engine, prompt, "hot", **FULL)
    assert engine.stats()["prefix_hits"] == 1
    answer(engine, prompt, "hot", **FULL)
    assert engine.stats()["prefix_hits"] == 2


def test_an_adapter_that_cannot_be_merged_stays_apart(model, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise loralab.errors.AdapterError("it has hooks", "leave it")

    monkeypatch.setattr("loralab.serving.merged.merge_in_place", refuse)
    engine = engine_of(model, first="hot")
    assert len(answer(engine, "hello", "hot", **FULL).tokens) == 6
    assert "stays apart" in caplog.text
    assert caplog.text.count("stays apart") == 1


def test_merging_waits_until_it_pays():
    policy = MergePolicy(saving=0.1, cost_seconds=1.0)
    for _ in range(99):
        policy.ran("hot", 0.1)
    assert policy.wanted() is None
    policy.ran("hot", 0.2)
    assert policy.wanted() == "hot"
    policy.interrupted()
    assert policy.wanted() is None


def test_traffic_that_changes_often_is_never_merged():
    policy = MergePolicy(saving=0.1, cost_seconds=1.0)
    for turn in range(50):
        for _ in range(9):
            policy.ran("hot" if turn % 2 else "cold", 1.0)
            assert policy.wanted() is None
        policy.ran(None, 0.1)


def test_the_policy_costs_at_most_twice_what_knowing_the_future_would():
    draw = random.Random(0)
    for _ in range(20):
        policy = MergePolicy(saving=draw.uniform(0.05, 0.3), cost_seconds=draw.uniform(0.1, 3))
        step = 0.2
        for _ in range(10):
            length = draw.expovariate(1 / 20)
            lost, merged = 0.0, False
            for _ in range(int(length / step)):
                if not merged:
                    policy.ran("hot", step)
                    lost += policy.saving * step
                    merged = policy.wanted() == "hot"
                    lost += policy.cost_seconds if merged else 0
            best = min(policy.saving * length, policy.cost_seconds)
            assert lost <= 2 * best + policy.saving * step
            policy.interrupted()


def test_a_policy_that_saves_nothing_never_merges():
    policy = MergePolicy(saving=0.0, cost_seconds=0.0)
    policy.ran("hot", 1000.0)
    assert policy.wanted() is None


def test_an_adapter_that_rounding_would_swallow_is_not_merged(caplog):
    torch.manual_seed(0)
    model = tiny_llama().to(torch.bfloat16)
    for name, size in (("small", 1e-6), ("large", 0.3)):
        loralab.attach(model, loralab.LoRAConfig(rank=2), name=name)
        for parameter in loralab.adapters.adapter_parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=size**0.5)
    assert rounding_loss(model, "small") > 0.5
    assert rounding_loss(model, "large") < 0.05
    engine = engine_of(model, first="small")
    answer(engine, "hello", "small", **FULL)
    assert engine.stats()["switches"] == 0
    assert "rounding would lose" in caplog.text


def test_one_merge_in_memory_loses_what_the_certificate_says():
    torch.manual_seed(0)
    model = tiny_llama().to(torch.bfloat16)
    loralab.attach(model, loralab.LoRAConfig(rank=2), name="a")
    for parameter in loralab.adapters.adapter_parameters(model, "a").values():
        torch.nn.init.normal_(parameter, std=0.1)
    _, certificate = loralab.merge(model, "a", force=True)
    assert rounding_loss(model, "a") == pytest.approx(certificate.relative_error, rel=0.2)
