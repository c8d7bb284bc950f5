"""Classes by each adapter's own head, and vectors, as PEFT gives them one text at a time."""

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from serving_models import byte_tokenizer, finish, tiny_llama
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import loralab
from loralab.errors import RequestError
from loralab.serving.encoder import ModelEncoder
from loralab.serving.engine import Engine
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.requests import Entry

NAMES = ("a", "b", "c")


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=264, num_attention_heads=4, num_labels=3, max_position_embeddings=64, **sizes
    )
    return BertForSequenceClassification(config).eval()


def llama() -> LlamaForSequenceClassification:
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def texts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, 256) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


def peft_classifier(base: PreTrainedModel, folder: Path, rank: int) -> PeftModel:
    """An adapter with a head of its own, written and kept by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=rank, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
        theirs: Any = get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("build", [bert, llama])
def test_each_adapters_own_head_answers_for_its_rows(build, tmp_path):
    model, oracles = build(), {}
    for rank, name in enumerate(NAMES, 1):
        oracles[name] = peft_classifier(build(), tmp_path / name, rank)
        loralab.load_adapter(model, tmp_path / name, name=name)
    engine = Engine(None, byte_tokenizer(), encoder=ModelEncoder(model))
    entries: list[Entry] = [[None, *NAMES][n % 4] for n in range(11)]
    asked = list(zip(texts(11), entries, strict=True))
    futures = [engine.classify(text, entry) for text, entry in asked]
    vectors = [engine.embed(text, entry) for text, entry in asked]
    ends = [engine.embed(text, entry, pooling="last") for text, entry in asked]
    finish(engine)
    base = build()
    for (text, entry), *answers in zip(asked, futures, vectors, ends, strict=True):
        one = base if entry is None else oracles[entry].base_model.model
        with torch.no_grad():
            ids = torch.tensor([text])
            hidden = one.base_model(ids).last_hidden_state[0]
            expected = one(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found = [future.result(timeout=0) for future in answers]
        for ours, theirs in zip(found, (expected, hidden.mean(0), hidden[-1]), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_causal_model_answers_and_embeds_in_one_engine(tmp_path):
    model = tiny_llama()
    encoder = ModelEncoder(model)
    runner = PlainRunner(model, num_slots=2, max_tokens=64)
    engine = Engine(runner, byte_tokenizer(), encoder=encoder)
    future = engine.embed((97, 98, 99))
    finish(engine)
    with torch.no_grad():
        expected = model.model(torch.tensor([[97, 98, 99]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(future.result(timeout=0), expected, atol=1e-5, rtol=1e-4)
    refused = engine.classify((97,))
    finish(engine)
    with pytest.raises(RequestError, match="no classification head"):
        refused.result(timeout=0)


def test_an_encoder_alone_embeds_and_writes_nothing():
    torch.manual_seed(0)
    model = BertModel(bert().config).eval()
    engine = Engine(None, byte_tokenizer(), encoder=ModelEncoder(model))
    good, bad = engine.embed((5, 6)), engine.embed((5, 6), "nobody")
    finish(engine)
    assert good.result(timeout=0).shape == (32,)  # the one that fails leaves the others alone
    with pytest.raises(loralab.errors.RouteError):
        bad.result(timeout=0)
    with pytest.raises(RequestError, match="at most 64"):
        engine.embed((5,) * 65)
    with pytest.raises(RequestError, match="can score"):
        engine.score((5, 6))
