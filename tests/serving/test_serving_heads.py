"""Adapters whose heads tell different numbers of classes apart, on one base, in one batch."""

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from served_adapters import SPECIAL, llama as causal, tokenizer
from served_http import Server, serving
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import loralab
from loralab.adapters import put_on, read_adapter, walk, write_adapter
from loralab.errors import AdapterError, RequestError
from loralab.models import build_model, load_model, name_labels
from loralab.runs.serve import Serving, opened
from loralab.serving.encoder import ModelEncoder
from loralab.serving.heads import classification_head
from loralab.serving.http import Keys

CLASSES = {"two": 2, "three": 3, "five": 5, "other": 3}
TEXTS = ["A film", "of no", "great worth, I fear,", "but", "a film.", "x", "Another one of these"]
VOCAB = len(SPECIAL) + 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def llama(num_labels: int = 2) -> PreTrainedModel:
    config = copy.deepcopy(causal().config)
    config.num_labels = num_labels
    return _built(LlamaForSequenceClassification, config)


def bert(num_labels: int = 2) -> PreTrainedModel:
    return _built(BertForSequenceClassification, BertConfig(num_labels=num_labels, **SIZES))


def roberta(num_labels: int = 2) -> PreTrainedModel:
    sizes = {**SIZES, "max_position_embeddings": 200, "num_labels": num_labels}
    return _built(RobertaForSequenceClassification, RobertaConfig(**sizes))


def _built(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The same body whatever the number of classes."""
    torch.manual_seed(0)
    model = kind(config).eval()
    draw = torch.Generator().manual_seed(7)
    for parameter in model.base_model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def peft_writes(base: PreTrainedModel, folder: Path, seed: int) -> PeftModel:
    """A random adapter with a head of its own, saved and kept by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=3, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
        theirs: Any = get_peft_model(base, config).eval()
        draw = torch.Generator().manual_seed(seed)
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        theirs.save_pretrained(folder)
    return theirs


def peft_folders(build: Any, root: Path) -> dict[str, Any]:
    return {
        name: peft_writes(build(count), root / name, seed)
        for seed, (name, count) in enumerate(CLASSES.items())
    }


@torch.no_grad()
def expected(theirs: Any, ids: list[int]) -> torch.Tensor:
    """Logits of one text, asked alone."""
    return theirs(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64)
    ).logits[0]


@pytest.mark.parametrize("build", [llama, bert, roberta])
def test_every_head_answers_with_its_own_classes_in_one_batch(build: Any, tmp_path: Path) -> None:
    oracles, model = peft_folders(build, tmp_path), build(4)
    modules, head = dict(walk(model)), classification_head(model)
    assert head is not None and head.num_outputs == 4
    for name in CLASSES:
        adapter = read_adapter(tmp_path / name)
        assert not loralab.adapters.misfits(adapter, modules, head)
        put_on(model, adapter, name, modules)
    oracles[None] = build(4)
    entries: list[Any] = [None, *CLASSES, None, "five"]
    texts = [list(text.encode()) for text in TEXTS]
    found = ModelEncoder(model).classify(texts, entries)
    for ids, entry, logits in zip(texts, entries, found, strict=True):
        theirs = expected(oracles[entry], ids)
        torch.testing.assert_close(logits, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [llama, bert])
def test_mixes_of_heads_of_one_size_add_up_and_of_several_are_refused(
    build: Any, tmp_path: Path
) -> None:
    peft_folders(build, tmp_path)
    model = build()
    modules = dict(walk(model))
    for name in CLASSES:
        put_on(model, read_adapter(tmp_path / name), name, modules)
    encoder, ids = ModelEncoder(model), list(b"some text")
    [mixed] = encoder.classify([ids], [{"three": 0.7, "other": 0.3}])
    # on a base that has three classes, whose head is zero, the mix is an ordinary one
    three = build(3)
    for tensor in three.get_submodule(encoder._head.path).parameters():  # pyright: ignore
        tensor.data.zero_()
    for name in ("three", "other"):
        loralab.load_adapter(three, tmp_path / name, name)
    with torch.no_grad(), loralab.use(three, {"three": 0.7, "other": 0.3}):
        theirs = three(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
    torch.testing.assert_close(mixed, theirs, atol=2e-5, rtol=1e-4)
    ragged = {"three": 0.5, "five": 0.5}
    with pytest.raises(RequestError, match=r"different numbers of classes apart \(3, 5\)"):
        encoder.classify([ids, ids], ["two", ragged])
    vectors = encoder.embed([ids, ids], ["two", ragged], "mean")  # no head is asked for it
    assert vectors.shape[0] == 2 and not torch.allclose(vectors[0], vectors[1], atol=1e-3)


def test_a_bias_may_be_there_or_not(tmp_path: Path) -> None:
    """Of Llama's head, which has none in transformers; loralab gives it one where asked."""
    for bias in (True, False):
        made = build_model(causal().config, num_labels=3, head_bias=bias, device="cpu", seed=3)
        config = loralab.LoRAConfig(rank=2, whole_modules=["score"])
        loralab.attach(made, config, "a", seed=1)
        for tensor in made.get_submodule("score.adapters.a").parameters():
            nn.init.normal_(tensor, std=0.5)
        folder = tmp_path / str(bias)
        loralab.save_adapter(made, "a", folder)
        with torch.no_grad(), loralab.use(made, "a"):
            wanted = made(torch.tensor([[9, 8, 7]])).logits[0]
        for other in (True, False):
            model = build_model(causal().config, head_bias=other, device="cpu", seed=3)
            modules, adapter = dict(walk(model)), read_adapter(folder)
            assert not loralab.adapters.misfits(adapter, modules, classification_head(model))
            put_on(model, adapter, "a", modules)
            [found] = ModelEncoder(model).classify([[9, 8, 7]], ["a"])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("heads")
    made = peft_folders(llama, root)
    named = llama(3)
    name_labels(named, ["bad", "mixed", "good"])
    loralab.attach(named, loralab.LoRAConfig(rank=2, whole_modules=["score"]), "a", seed=1)
    for path, tensor in loralab.adapters.adapter_parameters(named, "a").items():
        nn.init.normal_(tensor, std=0.3) if not path.endswith(".A") else None
    loralab.save_adapter(named, "a", root / "named")
    return root, made


@pytest.fixture(scope="module")
def server(oracles: tuple[Path, dict[str, Any]]) -> Iterator[Server]:
    with serving(oracles[0], llama(), num_slots=6) as made:
        yield made


def test_the_server_answers_each_as_transformers_and_peft_do(
    server: Server, oracles: tuple[Path, dict[str, Any]]
) -> None:
    asked = [(name, text) for name in CLASSES for text in TEXTS[:4]]
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(
                lambda pair: server.post("/v1/classify", {"model": pair[0], "input": pair[1]}),
                asked,
            )
        )
    for (name, text), answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        [row] = answer.json()["data"]
        theirs = expected(oracles[1][name], tokenizer()(text)["input_ids"]).softmax(-1)  # pyright: ignore
        assert row["num_classes"] == CLASSES[name] == len(row["probs"])
        torch.testing.assert_close(torch.tensor(row["probs"]), theirs, atol=1e-5, rtol=1e-4)
        assert row["label"] == f"LABEL_{int(theirs.argmax())}"


def test_an_adapters_own_names_of_its_classes(server: Server) -> None:
    rows = server.post("/v1/classify", {"model": "named", "input": TEXTS}).json()["data"]
    names = ("bad", "mixed", "good")
    for row in rows:
        assert row["label"] == names[max(range(3), key=row["probs"].__getitem__)]
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert cards["named"]["labels"] == list(names) and cards["two"]["labels"] is None
    paths = server.get("/openapi.json").json()["paths"]
    assert "/v1/classify" in paths and "/v1/completions" not in paths
    ragged = server.post("/v1/classify", {"model": "named=0.5,five=0.5", "input": "x"})
    assert ragged.status_code == 400 and "different numbers of classes" in ragged.text
    mixed = server.post("/v1/classify", {"model": "named=0.5,three=0.5", "input": "x"}).json()
    assert mixed["data"][0]["label"].startswith("LABEL_")  # they name their classes differently


def test_names_and_pooling_travel_with_an_adapter(tmp_path: Path) -> None:
    model = build_model(causal().config, num_labels=2, pooling="mean", device="cpu")
    name_labels(model, ["no", "yes"])
    loralab.attach(model, loralab.LoRAConfig(rank=2, whole_modules=["score"]), "a")
    loralab.save_adapter(model, "a", tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.label_names == ("no", "yes") and adapter.pooling == "mean"
    model.save_pretrained(tmp_path / "whole")
    assert load_model(str(tmp_path / "whole")).config.id2label == {0: "no", 1: "yes"}


def test_adapters_of_other_kinds_of_models_are_refused_by_name(tmp_path: Path) -> None:
    made = build_model(causal().config, num_labels=2, pooling="mean", device="cpu")
    loralab.attach(made, loralab.LoRAConfig(rank=2, whole_modules=["score"]), "a")
    loralab.save_adapter(made, "a", tmp_path / "pooled")
    wide = read_adapter(tmp_path / "pooled")
    wrong = replace(wide, extra={"score.weight": torch.zeros(3, 7)}, facts={})
    write_adapter(wrong, tmp_path / "wrong")
    with serving(tmp_path, build_model(causal().config, device="cpu")) as server:
        for name, words in (
            ("pooled", "trained with pooling 'mean', this server's model has pooling 'last'"),
            ("wrong", "score.weight: (3, 7), the model's is (3, 16)"),
        ):
            answer = server.post("/v1/classify", {"model": name, "input": "x"})
            assert answer.status_code == 422 and words in answer.json()["error"]["message"]
    with serving(tmp_path) as server:
        answer = server.post("/v1/completions", {"model": "pooled", "prompt": "x"})
        assert answer.status_code == 422
        assert "it is a classifier's, and this server writes text" in answer.text


@pytest.mark.parametrize("damage", ['{"labels": [1]}', '{"labels": "x"}', '{"pooling": 3}', "[]"])
def test_names_that_are_none_are_a_fault_of_the_file(damage: str, tmp_path: Path) -> None:
    made = build_model(causal().config, num_labels=2, device="cpu")
    loralab.attach(made, loralab.LoRAConfig(rank=2, whole_modules=["score"]), "a")
    adapter = loralab.adapters.extract(made, "a")
    write_adapter(replace(adapter, facts={**adapter.facts, "classifier": damage}), tmp_path / "a")
    with pytest.raises(AdapterError, match="classifier in the metadata is not readable"):
        read_adapter(tmp_path / "a")


def test_a_folder_of_classifiers_is_served_on_a_base_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pooling is the model's; two of them name their classes differently."""
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    causal().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    wanted, ids = {}, [9, 8, 7]
    for name, names in (("a", ["no", "yes"]), ("b", ["x", "y", "z"])):
        model = load_model(str(tmp_path / "tiny"), num_labels=len(names), pooling="mean")
        name_labels(model, names)
        loralab.attach(model, loralab.LoRAConfig(rank=2, whole_modules=["score"]), name, seed=1)
        for tensor in model.get_submodule(f"score.adapters.{name}").parameters():
            nn.init.normal_(tensor, std=0.5)
        loralab.save_adapter(model, name, tmp_path / "adapters" / name)
        with torch.no_grad(), loralab.use(model, name):
            wanted[name] = model(torch.tensor([ids])).logits[0]
    told = Serving(base=str(tmp_path / "tiny"), adapters=tmp_path / "adapters", dtype="float32")
    with opened(told, Keys()) as service, service.store.lease(["a", "b"]).result() as lease:
        for version in lease.versions:
            found = service.engine.classify(ids, version.hosted).result()
            torch.testing.assert_close(found, wanted[version.name], atol=1e-5, rtol=1e-4)
        assert [version.labels for version in lease.versions] == [("no", "yes"), ("x", "y", "z")]
