"""Every setting of an adapter through a whole run: it is in force, saved, loaded, resumed."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loralab
from loralab.adapters import read_adapter
from loralab.config import load_config
from loralab.errors import AdapterError, ConfigError, Interrupted, ResumeError, TargetError
from loralab.events import Progress
from loralab.runs.evaluate import trained_model
from loralab.runs.folder import open_run
from loralab.runs.init import write_recipe
from loralab.runs.train import resume, train
from loralab.runs.workbench import base_model
from loralab.training import starting

SHORT = {
    "data__train_rows": 64,
    "data__validation_rows": 24,
    "data__test_rows": 16,
    "training__epochs": 1,
    "training__checkpoint_steps": 1,
}
SPLITS = ("validation",)


@pytest.fixture
def trained(settings, tmp_path):
    return lambda **changes: train(settings(**SHORT, **changes), tmp_path / "run", splits=SPLITS)


def ranks(adapter):
    return {module: A.shape[0] for module, (A, _) in adapter.pairs.items()}


def has_patterns(adapter, _):
    by_end = {module.rpartition(".")[2]: rank for module, rank in ranks(adapter).items()}
    assert by_end["query"] == 2 and by_end["key"] == 4
    scales = {m.rpartition(".")[2]: adapter.scale(m) for m in adapter.pairs}
    assert scales["query"] == 8.0 / 2 and scales["value"] == 1.0 / 4


def has_chosen_modules(adapter, _):
    assert ranks(adapter).keys() == {
        f"bert.encoder.layer.1.{name}"
        for name in ("attention.self.query", "attention.self.key", "attention.output.dense")
    }


def has_biases(adapter, base):
    assert not torch.equal(
        adapter.extra["bert.encoder.layer.0.attention.self.query.bias"],
        base["bert.encoder.layer.0.attention.self.query.bias"],
    )


def has_every_bias(adapter, base):
    has_biases(adapter, base)
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in adapter.extra


def has_magnitudes(adapter, base):
    name = "bert.encoder.layer.1.output.dense"
    norm = base[f"{name}.weight"].norm(dim=1)
    assert adapter.magnitudes.keys() == adapter.pairs.keys()
    assert not torch.allclose(adapter.magnitudes[name], norm, atol=1e-4)


def has_token_rows(adapter, base):
    ((name, (indices, rows)),) = adapter.token_rows.items()
    assert indices.tolist() == [4, 10]  # "fine" and "dull"
    assert not torch.allclose(rows, base[f"{name}.weight"][indices], atol=1e-4)


def has_whole_norms(adapter, _):
    assert "bert.encoder.layer.0.output.LayerNorm" in adapter.whole_modules
    assert "classifier" in adapter.whole_modules


def has_rank_of_a_plain_adapter(adapter, _):
    assert set(ranks(adapter).values()) == {8}  # twice 4: it moved the base


def has_eva_ranks(adapter, _):
    found = ranks(adapter)
    assert len(set(found.values())) > 1
    assert max(found.values()) <= 8


def has_equal_ranks(adapter, _):
    assert set(ranks(adapter).values()) == {4}


@pytest.mark.parametrize(
    ("method", "holds"),
    [
        (
            {"rank_pattern": {"query": 2}, "alpha_pattern": {r".*\.(value|x)": 1.0}},
            has_patterns,
        ),
        (
            {"layers": "1", "exclude": ["value", "intermediate.dense", "1.output.dense"]},
            has_chosen_modules,
        ),
        ({"biases": "targets"}, has_biases),
        ({"biases": "all"}, has_every_bias),
        ({"dora": True}, has_magnitudes),
        ({"token_rows": {"word_embeddings": [4, 10]}}, has_token_rows),
        ({"whole_modules": ["LayerNorm"]}, has_whole_norms),
        ({"init": "gaussian", "scaling": "alpha/sqrt(rank)"}, has_equal_ranks),
        ({"init": "orthogonal"}, has_equal_ranks),
        ({"init": "pissa"}, has_rank_of_a_plain_adapter),
        ({"init": "olora"}, has_rank_of_a_plain_adapter),
        ({"init": "lora_ga"}, has_rank_of_a_plain_adapter),
        ({"init": "eva"}, has_eva_ranks),
        ({"init": "eva", "redistribute_ranks": False}, has_equal_ranks),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_setting_is_in_force_and_what_is_saved_answers_as_what_was_trained(
    method, holds, trained, settings
):
    run = trained(**{f"method__{key}": value for key, value in method.items()})
    base = base_model(run.config).state_dict()
    holds(read_adapter(run.artifact), base)
    stored = run.predictions("validation")
    loralab.evaluate(run, split="validation")
    for before, after in zip(stored, run.predictions("validation"), strict=True):
        assert after["nll"] == pytest.approx(before["nll"], abs=2e-5)


def test_loraplus_is_a_rate_of_its_own_for_b(trained):
    run = trained(method__loraplus_lr_ratio=8.0)
    for row in run.rows_of("metrics.jsonl"):
        if "loss" in row:
            rates = row["learning_rates"]
            assert rates["adapter_B"] == pytest.approx(8 * rates["adapter"])
            assert rates["head"] == rates["adapter"]
    step = run.manifest["effective_step"]
    assert step["learning_rate_B"] == 8 * step["learning_rate_A"] == 8e-2


def test_every_run_states_its_effective_step(trained):
    run = trained(method__rank_pattern={"query": 2})
    step = run.manifest["effective_step"]
    assert step["effective_step"] == pytest.approx(
        step["scale"] * step["std_A"] * run.config.training.learning_rate
    )
    assert step["lowest"] < step["effective_step"] <= step["highest"]
    assert "effective step" in (run.folder / "report.html").read_text()
    assert "Effective first step" in (run.artifact / "README.md").read_text()


def test_patterns_that_match_nothing_are_named(settings, tmp_path):
    changes = {
        "method__rank_pattern": {"qery": 2, "query": 4},
        "method__alpha_pattern": {"valu": 2.0},
    }
    with pytest.raises(TargetError) as caught:
        train(settings(**SHORT, **changes), tmp_path / "run")
    assert "rank_pattern 'qery' matches no module of the adapter; did you mean 'query'" in str(
        caught.value
    )
    assert "alpha_pattern 'valu'" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def interrupted(settings, tmp_path):
    """A run stopped after its second step, by the initialisation it started from."""

    def start(init):
        steps = []

        def listen(event):
            if isinstance(event, Progress):
                steps.append(event)
                if len(steps) == 4:  # the run announces step 0 first
                    raise KeyboardInterrupt

        config = settings(**SHORT, method__init=init)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "stopped", splits=SPLITS, listen=listen)
        return config, tmp_path / "stopped"

    return start


@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa"])
def test_a_resumed_run_goes_on_from_the_start_that_was_kept(
    init, interrupted, tmp_path, monkeypatch
):
    config, folder = interrupted(init)
    whole = train(config, tmp_path / "whole", splits=SPLITS)
    monkeypatch.setattr(starting, "starts_from_data", None)  # nothing is computed again
    resumed = resume(folder)
    expected = load_file(whole.artifact / "adapter_model.safetensors")
    found = load_file(resumed.artifact / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    metrics = [(run.folder / "metrics.jsonl").read_bytes() for run in (whole, resumed)]
    assert metrics[0] == metrics[1]


def test_another_start_is_refused(interrupted):
    _, folder = interrupted("pissa")
    file = folder / "checkpoints" / "start.safetensors"
    kept = load_file(file)
    name = next(name for name in kept if name.endswith(".A"))
    kept[name][0, 0] += 1
    chosen = json.dumps({"rank_pattern": {}, "exclude": []})
    save_file(kept, file, metadata={"config": chosen})
    with pytest.raises(ResumeError, match=r"parameters\.start was"):
        resume(folder)
    file.write_bytes(b"not this")
    with pytest.raises(ResumeError, match=r"start\.safetensors is damaged"):
        resume(folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's call
def test_peft_reads_a_run_with_dora_and_patterns(trained):
    run = trained(
        method__dora=True,
        method__rank_pattern={"query": 2, r"layer\.1\..*\.dense": 6},
        method__alpha_pattern={"value": 3.0},
        model__pooling="native",
    )
    ids = {"input_ids": torch.tensor([[4, 10, 16, 17, 18]])}
    model, route = trained_model(run)
    with torch.no_grad(), loralab.use(model, route):
        ours = model(**ids).logits
    theirs = peft.PeftModel.from_pretrained(base_model(run.config), run.artifact).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_a_run_is_merged_on_the_probes_it_was_saved_with(trained, tmp_path, monkeypatch):
    from loralab.runs import merge as merging, workbench

    run = trained()
    probes = read_adapter(run.artifact).probes
    assert len(probes) == 16
    monkeypatch.setattr(workbench, "load_dataset", None)  # the rows are not needed any more
    certificate = merging.merge(run.folder, tmp_path / "merged")
    assert certificate["num_positions"] == len(probes)
    assert certificate["effect_kept"] > 0.99
    assert certificate["logit_kl"] < 1e-6


def test_an_adapter_folder_is_measured_on_its_probes_where_asked(trained, tiny_model, tmp_path):
    from loralab.runs.merge import merge

    run = trained(model__pooling="native")
    certificate = merge(run.artifact, tmp_path / "m", base=str(tiny_model), measure=True)
    assert certificate["num_positions"] == 16
    assert certificate["effect_kept"] > 0.99
    (run.artifact / "probes.json").unlink()
    with pytest.raises(ConfigError, match="holds no probes"):
        merge(run.artifact, tmp_path / "n", base=str(tiny_model), measure=True)


def test_an_adapter_on_another_base_is_found_by_its_probes(trained, tmp_path):
    run = trained(model__pooling="mean")
    text = (run.folder / "config.toml").read_text()
    (run.folder / "config.toml").write_text(text.replace('"mean"', '"last"'))
    with pytest.raises(AdapterError, match="nats away from what it said"):
        trained_model(open_run(run.folder))


def test_every_setting_that_a_written_recipe_mentions_exists(tmp_path):
    write_recipe(tmp_path / "r.toml", model="minilm", data="tweets")
    text = (tmp_path / "r.toml").read_text()
    (tmp_path / "all.toml").write_text(re.sub(r"(?m)^# (?=\w+(\.\w+)? = )", "", text))
    config = load_config(tmp_path / "all.toml")
    assert config.method.rank_pattern[r"layers\.0\..*"] == 32
    assert (config.method.dora, config.method.biases) == (True, "targets")
