"""Exports say what the adapter says, and hold nothing that an engine would misread."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

import loralab
from loralab.adapters import adapter_parameters, extract, read_adapter, write_adapter
from loralab.errors import AdapterError, ConfigError
from loralab.exporting import ENGINES, canonical, find_engine
from loralab.models import StoredWeights

ENGINE_NAMES = ("vllm", "sglang", "peft")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(4))


def logits(model: Any, name: str | None) -> torch.Tensor:
    with torch.no_grad(), loralab.use(model, name):
        return model(IDS).logits


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    """What PEFT makes of the folder on the base."""
    return peft_runs(loralab.load_model(str(base), task="causal"), folder)


def peft_runs(model: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own are not ours to mend
        return PeftModel.from_pretrained(model, folder).eval()(IDS).logits


def refuses(engine: str, config: dict[str, Any]) -> list[str]:
    """What that engine's check of adapter_config.json would say, or would read wrongly.

    vLLM 0.33.0: vllm/lora/peft_helper.py, `PEFTHelper._validate_features` and `validate_legal`.
    SGLang 0.5.23: srt/lora/lora_config.py, srt/lora/lora.py (`scaling = lora_alpha / r`),
    srt/lora/utils.py (`get_normalized_target_modules`).
    """
    wanted: dict[str, Callable[[Any], bool]] = {
        "r": lambda value: isinstance(value, int) and value > 0,
        "lora_alpha": lambda value: value == config["r"],
        "use_dora": lambda value: not value,
        "use_rslora": lambda value: not value,
        "rank_pattern": lambda value: not value,
        "alpha_pattern": lambda value: not value,
        "lora_bias": lambda value: not value,
        "init_lora_weights": lambda value: value is True,
        "layer_replication": lambda value: not value,
    }
    if engine == "vllm":
        wanted["bias"] = lambda value: value == "none"
        wanted["modules_to_save"] = lambda value: set(value or ()) <= {"classifier", "score"}
        wanted["target_modules"] = lambda value: bool(value)
    if engine == "sglang":
        wanted["peft_type"] = lambda value: value.lower() == "lora"
        wanted["modules_to_save"] = lambda value: not value
        wanted["target_modules"] = lambda value: isinstance(value, list)
    return [key for key, fits in wanted.items() if not fits(config.get(key))]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"scaling": "alpha/sqrt(rank)"},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 3.0, r"layers\.0\..*o_proj": 20}},
    "both, rsLoRA": {
        "rank_pattern": {"k_proj": 1},
        "alpha_pattern": {"k_proj": 5},
        "scaling": "alpha/sqrt(rank)",
    },
    "some layers": {"layers": [1], "targets": ["q_proj", "v_proj", "down_proj"]},
    "a changed base": {"init": "pissa"},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_export_says_in_peft_what_the_adapter_says(
    kind: str, decoder: Path, make_adapter: Any, tmp_path: Path
) -> None:
    model, _ = make_adapter(**KINDS[kind])
    wanted, plain = logits(model, "a"), logits(model, None)
    assert (wanted - plain).abs().max() > 0.05
    structure = StoredWeights(str(decoder)).structure()
    for engine in ENGINE_NAMES:
        found = canonical(extract(model, "a"), ENGINES[engine], structure=structure)
        write_adapter(found.adapter, tmp_path / engine)
        assert not found.errors
        torch.testing.assert_close(
            peft_logits(decoder, tmp_path / engine), wanted, atol=1e-5, rtol=1e-5
        )
        config = json.loads((tmp_path / engine / "adapter_config.json").read_text())
        assert refuses(engine, config) == []
        shapes = {A.shape[0] for A, _ in read_adapter(tmp_path / engine).pairs.values()}
        assert shapes == {config["r"]} == {found.rank}


def test_a_base_that_its_start_moved_doubles_the_rank(make_adapter: Any) -> None:
    model, _ = make_adapter(init="pissa")
    assert canonical(extract(model, "a"), ENGINES["vllm"]).rank == 8


def test_transposed_layers_keep_their_meaning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = loralab.load_model(str(tmp_path / "base"), task="causal").eval()
    loralab.attach(model, loralab.LoRAConfig(rank=3, alpha=9, targets=["c_attn"]), name="a")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "a").items():
            parameter.normal_(std=0.5) if name.endswith("B") else None
    found = canonical(extract(model, "a"), ENGINES["vllm"])
    write_adapter(found.adapter, tmp_path / "out")
    torch.testing.assert_close(
        peft_logits(tmp_path / "base", tmp_path / "out"), logits(model, "a"), atol=1e-5, rtol=1e-5
    )


def test_siblings_that_sglang_stacks_are_added_as_zeros(
    decoder: Path, make_adapter: Any, tmp_path: Path
) -> None:
    model, _ = make_adapter(targets=["k_proj", "up_proj"])
    adapter = extract(model, "a")
    with pytest.raises(AdapterError, match=r"has a pair too.*\n.*name the base with --base"):
        canonical(adapter, ENGINES["sglang"])
    structure = StoredWeights(str(decoder)).structure()
    found = canonical(adapter, ENGINES["sglang"], structure=structure)
    kinds = {path.rpartition(".")[2] for path in found.adapter.pairs}
    assert kinds == {"k_proj", "up_proj", "q_proj", "v_proj", "gate_proj"}
    assert "6 pairs of zeros were added" in " ".join(found.notes)
    write_adapter(found.adapter, tmp_path / "out")
    torch.testing.assert_close(
        peft_logits(decoder, tmp_path / "out"), logits(model, "a"), atol=1e-5, rtol=1e-5
    )
    assert len(canonical(adapter, ENGINES["vllm"]).adapter.pairs) == 4


class TestDoRA:
    def test_peft_keeps_it(self, decoder: Path, make_adapter: Any, tmp_path: Path) -> None:
        model, _ = make_adapter(dora=True, scaling="alpha/sqrt(rank)")
        found = canonical(extract(model, "a"), ENGINES["peft"])
        write_adapter(found.adapter, tmp_path / "out")
        torch.testing.assert_close(
            peft_logits(decoder, tmp_path / "out"), logits(model, "a"), atol=1e-4, rtol=1e-4
        )

    def test_others_refuse_it_by_name_with_both_ways_out(self, make_adapter: Any) -> None:
        model, _ = make_adapter(dora=True)
        with pytest.raises(AdapterError) as caught:
            canonical(extract(model, "a"), ENGINES["vllm"])
        assert "DoRA: model.layers.0" in caught.value.cause
        assert "use_dora is refused" in caught.value.cause
        assert "--merged" in caught.value.next_step
        assert "--rank" in caught.value.next_step

    def test_a_rank_makes_it_plain_with_the_error_of_each_module(
        self, decoder: Path, make_adapter: Any
    ) -> None:
        model, _ = make_adapter(dora=True, targets=["q_proj", "v_proj"])
        adapter, stored = extract(model, "a"), StoredWeights(str(decoder))
        errors = []
        for rank in (2, 16, 64):
            found = canonical(adapter, ENGINES["vllm"], rank=rank, weights=stored.read)
            assert not found.adapter.magnitudes
            assert set(found.errors) <= set(adapter.pairs)
            errors.append(max(found.errors.values()))
            for path, error in found.errors.items():
                weight = stored.read(f"{path}.weight")
                assert weight is not None
                wanted = _dora(adapter, path, weight) - weight
                missing = loralab_delta(found.adapter, path) - wanted
                assert error == pytest.approx(float(missing.norm() / wanted.norm()), abs=1e-5)
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-5  # of full rank it is exact


def _dora(adapter: Any, path: str, weight: torch.Tensor) -> torch.Tensor:
    A, B = adapter.pairs[path]
    changed = weight + adapter.scale(path) * B @ A
    return changed * (adapter.magnitudes[path] / changed.norm(dim=1))[:, None]


def loralab_delta(adapter: Any, path: str) -> torch.Tensor:
    A, B = adapter.pairs[path]
    return adapter.scale(path) * B @ A


def test_a_smaller_rank_states_its_error(make_adapter: Any) -> None:
    model, _ = make_adapter(rank=8)
    found = canonical(extract(model, "a"), ENGINES["vllm"], rank=4)
    assert found.rank == 4
    adapter = extract(model, "a")
    path = "model.layers.0.mlp.up_proj"
    wanted = loralab_delta(adapter, path)
    singular = torch.linalg.svdvals(wanted)
    assert found.errors[path] == pytest.approx(
        float(singular[4:].norm() / singular.norm()), rel=1e-4
    )
    assert "the largest error is" in " ".join(found.notes)
    assert not found.adapter.probes


class TestWhatIsNotCarried:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"whole_modules": ["norm"]}, "whole modules: model.norm"),
            ({"token_rows": {"embed_tokens": [5, 6]}}, "token rows: model.embed_tokens"),
        ],
    )
    @pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp", "ollama"])
    def test_it_is_named_with_the_place_that_refuses_it(
        self, engine: str, settings: Any, named: str, make_adapter: Any
    ) -> None:
        model, _ = make_adapter(**settings)
        with pytest.raises(AdapterError) as caught:
            canonical(extract(model, "a"), ENGINES[engine])
        assert named in caught.value.cause
        assert ".py" in caught.value.cause or ".cpp" in caught.value.cause
        assert caught.value.next_step == "merge instead (--merged), which carries all of it."

    def test_all_of_it_is_named_at_once(self, make_adapter: Any) -> None:
        model, _ = make_adapter(dora=True, whole_modules=["norm"], token_rows={"embed_tokens": [5]})
        with pytest.raises(AdapterError) as caught:
            canonical(extract(model, "a"), ENGINES["sglang"], rank=4)
        for part in ("DoRA", "whole modules", "token rows"):
            assert part in caught.value.cause

    def test_peft_carries_it(self, decoder: Path, make_adapter: Any, tmp_path: Path) -> None:
        model, _ = make_adapter(whole_modules=["norm"], token_rows={"embed_tokens": [5, 6]})
        write_adapter(canonical(extract(model, "a"), ENGINES["peft"]).adapter, tmp_path / "out")
        torch.testing.assert_close(
            peft_logits(decoder, tmp_path / "out"), logits(model, "a"), atol=1e-5, rtol=1e-5
        )


class TestClassifiers:
    @pytest.fixture
    def classifier(self) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            num_labels=3,
        )
        model = LlamaForSequenceClassification(config).eval()
        lora = loralab.LoRAConfig(rank=2, alpha=6, whole_modules=["score"])
        loralab.attach(model, lora, name="a")
        with torch.no_grad():
            for parameter in adapter_parameters(model, "a").values():
                parameter.normal_(std=0.3)
        return model

    def test_vllm_takes_the_head(self, classifier: Any, tmp_path: Path) -> None:
        found = canonical(extract(classifier, "a"), ENGINES["vllm"])
        write_adapter(found.adapter, tmp_path / "out")
        wanted = logits(classifier, "a")
        loralab.detach(classifier, "a")
        theirs = peft_runs(classifier, tmp_path / "out")
        torch.testing.assert_close(theirs, wanted, atol=1e-5, rtol=1e-5)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert refuses("vllm", config) == []

    def test_sglang_does_not(self, classifier: Any) -> None:
        with pytest.raises(AdapterError, match=r"whole modules: score \(srt/lora/lora.py"):
            canonical(extract(classifier, "a"), ENGINES["sglang"])


@pytest.mark.parametrize(
    ("rank", "limit"), [(1, 1), (3, 8), (16, 16), (200, 256), (300, 320), (512, 512), (513, None)]
)
def test_vllm_has_a_set_of_rank_limits(rank: int, limit: int | None) -> None:
    assert ENGINES["vllm"].rank_limit(rank) == limit


def test_an_unknown_engine_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown engine 'vlm'\n.*did you mean 'vllm'"):
        find_engine("vlm")
