"""Loading from folders: heads from the seed alone, and errors that name the fault."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging as talk

from loralab.errors import ModelError
from loralab.models import hub, load_model, load_tokenizer, num_parameters

Build = Callable[..., PreTrainedModel]
Save = Callable[..., Path]


def shards(folder: Path, model: PreTrainedModel) -> list[Path]:
    model.base_model.save_pretrained(folder, max_shard_size="4KB")
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_the_head_depends_on_the_seed_alone(saved: Save, family: str) -> None:
    folder = str(saved(family))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (load_model(folder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    head = one._loralab_fresh_head
    assert head == ("score" if family in ("llama", "gpt2") else "classifier")
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        drawn = name.startswith(f"{head}.") and not name.endswith("bias")
        assert torch.equal(parameter, other.get_parameter(name)) != drawn, name
    bf16 = load_model(folder, seed=1, dtype="bfloat16")
    for name, parameter in bf16.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name).bfloat16())
    assert not one.training


def test_the_head_has_transformers_own_spread(saved: Save) -> None:
    weight = load_model(str(saved("llama")), num_labels=400).score.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.mean().abs() < 0.002


def test_head_bias(saved: Save) -> None:
    folder = str(saved("llama"))
    plain, biased = load_model(folder), load_model(folder, head_bias=True)
    assert plain.score.bias is None
    assert torch.equal(biased.score.bias, torch.zeros(2))
    assert torch.equal(biased.score.weight, plain.score.weight)
    assert num_parameters(biased) == num_parameters(plain) + 2
    bert = str(saved("bert"))
    assert load_model(bert, head_bias=False).classifier.bias is not None


def test_pooling_by_mean_leaves_no_pooler(saved: Save) -> None:
    folder = str(saved("bert"))
    native, mean = load_model(folder), load_model(folder, pooling="mean")
    assert num_parameters(native) - num_parameters(mean) == 16 * 16 + 16
    assert torch.equal(native.classifier.weight, mean.classifier.weight)


def test_a_missing_pooler_is_drawn_and_said(saved: Save, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved("bert")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    one, same = load_model(str(folder)), load_model(str(folder))
    assert torch.equal(one.bert.pooler.dense.weight, same.bert.pooler.dense.weight)
    assert "bert.pooler.dense not in the folder, freshly initialised" in caplog.text
    caplog.clear()
    assert load_model(str(folder), pooling="mean")._loralab_fresh_head == "classifier"
    assert not caplog.text


def test_loading_is_quiet_and_keeps_transformers_voice(
    saved: Save, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(saved("llama"))
    capfd.readouterr()
    before = talk.get_verbosity(), talk.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert (talk.get_verbosity(), talk.is_progress_bar_enabled()) == before


def test_every_missing_and_truncated_shard_is_listed(small: Build, tmp_path: Path) -> None:
    first, second, *_ = shards(tmp_path, small("llama"))
    assert load_model(str(tmp_path))._loralab_fresh_head == "score"
    first.unlink()
    second.write_bytes(second.read_bytes()[:-9])
    expected = (
        rf"weights are not whole: {first.name} is missing; {second.name} is truncated"
        r".*\n.*download the model again"
    )
    with pytest.raises(ModelError, match=expected):
        load_model(str(tmp_path))


def test_lost_base_weights_are_an_error_and_strange_ones_a_warning(
    saved: Save, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved("llama")
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.mlp.side_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "loralab"):
        load_model(str(folder))
    assert "1 weights that LlamaForSequenceClassification has no place for" in caplog.text
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*: model\.layers\.1\.mlp\.up_proj"):
        load_model(str(folder))


def test_a_causal_model_needs_its_head(saved: Save, small: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks .* BertLMHead.*\n.*encoder such as BERT cannot"):
        load_model(str(saved("bert")), task="causal")
    small("llama", task="causal").save_pretrained(tmp_path / "causal")
    causal = load_model(str(tmp_path / "causal"), task="causal")
    assert causal._loralab_fresh_head is None
    classifier = load_model(str(tmp_path / "causal"))
    assert classifier._loralab_fresh_head == "score"


def test_a_head_with_another_number_of_labels(small: Build, tmp_path: Path) -> None:
    small("llama", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"head with 3 labels, .* ask for 2\n.*num_labels = 3"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), num_labels=3)._loralab_fresh_head is None


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(saved: Save, file: str) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors\n.*copy the weights"):
        load_model(str(folder))
    torch.save({}, folder / file)
    with pytest.raises(ModelError, match=rf"only as pickles \({file}\).*\n.*save_pretrained"):
        load_model(str(folder))


def test_folders_that_are_no_models(tmp_path: Path, saved: Save) -> None:
    folder = saved("llama")
    with pytest.raises(ModelError, match=r"has no config\.json.*\n.*did you mean .*llama\?"):
        load_model(str(folder.parent))
    with pytest.raises(ModelError, match=r"is a file; .*\n.*give the folder: .*llama"):
        load_model(str(folder / "config.json"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        load_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=r"no model folder \./nowhere.*\n.*minilm, smollm2"):
        load_model("./nowhere")
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    with pytest.raises(ModelError, match=r"no model that transformers knows(.|\n)*trust_remote"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json describes no model"):
        load_model(str(folder))


def test_names_that_lead_nowhere_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set\n.*did you mean 'smollm2'"):
        load_model("smolm2")
    with pytest.raises(ModelError, match=r"'llama-3\.2-1b' is a preset: .* without weights"):
        load_model("llama-3.2-1b")
    with pytest.raises(ModelError, match=r"'tweets' is a data set of the catalogue"):
        load_model("tweets")
    with pytest.raises(ModelError, match="no model 'nobody/nothing' here"):
        load_tokenizer("nobody/nothing")


def test_an_unreachable_hub_is_told_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, name: str, timeout: float) -> None:
        assert timeout <= 10
        raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "model_info", refuse)
    with pytest.raises(ModelError, match=r"cannot be reached \(no route to host\)\n.*its folder"):
        load_model("nobody/nothing")


def test_damaged_index(small: Build, tmp_path: Path) -> None:
    shards(tmp_path, small("llama"))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        load_model(str(tmp_path))


def test_a_model_in_the_hubs_cache_loads_without_the_hub(
    saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--some--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    saved("llama").rename(cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(hub.HfApi, "model_info", _no_network)
        assert load_model("some/tiny")._loralab_fresh_head == "score"


def _no_network(*_: object, **__: object) -> None:
    raise ConnectionError("no route to host")
