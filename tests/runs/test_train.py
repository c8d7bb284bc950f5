"""A run from settings to files, and everything that is refused before it starts."""

import functools
import json
import tomllib

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import loralab
from loralab.cli import main
from loralab.config import parse_config
from loralab.errors import (
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    RunError,
    TargetError,
)
from loralab.models import precision
from loralab.runs.folder import open_run
from loralab.runs.train import train
from loralab.training import compiling
from loralab.training.step import Stepper

METHODS = ["lora", "full", "frozen", "head"]


pytestmark = pytest.mark.xdist_group("runs")  # one worker makes what its tests share


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """The run of some settings, trained once for the tests that only read it."""

    @functools.cache
    def made(**changes):
        return train(settings(**changes), tmp_path_factory.mktemp("trained") / "run")

    return made


@pytest.mark.parametrize("method", METHODS)
def test_a_run_describes_itself_and_evaluates_to_the_same_again(method, trained, capsys):
    run = trained(method__kind=method, method__frozen_layers=1)
    assert run.finished
    assert parse_config(tomllib.loads((run.folder / "config.toml").read_text())) == run.config
    files = {path.name for path in run.folder.iterdir()}
    assert {"config.toml", "manifest.json", "metrics.jsonl", "evaluation", "report.html"} <= files
    assert "checkpoints" not in files
    stored = run.metrics("test")
    again = loralab.evaluate(run)
    assert again["metrics"] == stored["metrics"]
    assert stored["metrics"]["accuracy"]["mean"] > 0.6
    assert "loralab" in (run.artifact / "README.md").read_text()


@pytest.mark.parametrize("speedup", [0.1, 2.0])
def test_an_automatic_dtype_is_measured_once_and_written_down(
    speedup, settings, tmp_path, monkeypatch
):
    half = speedup > 1
    rate = {torch.float32: 1.0, torch.bfloat16: speedup}
    monkeypatch.setattr(precision, "_products_per_second", lambda _device, dtype: rate[dtype])
    precision.choose_dtype.cache_clear()
    run = train(settings(model__dtype="auto"), tmp_path / "run")
    assert run.config.model.dtype == ("bfloat16" if half else "float32")
    stored = tomllib.loads((run.folder / "config.toml").read_text())
    assert stored["model"]["dtype"] == run.config.model.dtype
    precision.choose_dtype.cache_clear()


@pytest.mark.parametrize("setting", ["on", "off"])
def test_automatic_compiling_is_timed_once_and_written_down(
    setting, settings, tmp_path, monkeypatch
):
    counter, compile_with = CompileCounter(), Stepper.compile
    monkeypatch.setattr(
        Stepper, "compile", lambda own, rows, _=None: compile_with(own, rows, counter)
    )
    monkeypatch.setattr(compiling, "FEWEST_STEPS", 1)
    monkeypatch.setattr(compiling, "LIKELY_COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(compiling, "CLEARLY_FASTER", 1e9 if setting == "on" else 0.0)
    few = {"data__train_rows": 64, "training__epochs": 1}
    chosen = train(settings(training__compile="auto", **few), tmp_path / "chosen")
    given = train(settings(training__compile=setting, **few), tmp_path / "given")
    stored = tomllib.loads((chosen.folder / "config.toml").read_text())
    assert stored["training"]["compile"] == setting
    assert chosen.manifest["compile"]["setting"] == setting
    assert chosen.manifest["compile"]["compiled_seconds"] > 0
    metrics = [(run.folder / "metrics.jsonl").read_bytes() for run in (chosen, given)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_trains_differs_from_the_base(method, trained, settings):
    from loralab.runs.evaluate import trained_model
    from loralab.runs.workbench import base_model

    run = trained(method__kind=method, method__frozen_layers=1)
    base = base_model(run.config).state_dict()
    model, _ = trained_model(run)
    changed = {
        name
        for name, value in model.state_dict().items()
        if name in base and not torch.equal(value, base[name])
    }
    if method in ("lora", "head"):
        assert changed <= {"classifier.weight", "classifier.bias"}
    if method == "frozen":
        assert not any(".layer.0." in name or "embeddings" in name for name in changed)
        assert any(".layer.1." in name for name in changed)
    if method == "full":
        assert any("embeddings" in name for name in changed)
        assert any(".layer.0." in name for name in changed)


def test_the_same_settings_give_the_same_bytes(settings, tmp_path):
    config = settings(method__dropout=0.1, data__train_rows=200)
    runs = [train(config, tmp_path / name) for name in "ab"]
    one, two = (load_file(run.artifact / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    texts = [(run.folder / "metrics.jsonl").read_bytes() for run in runs]
    assert texts[0] == texts[1]


def test_methods_see_the_same_batches_in_the_same_order(settings, tmp_path):
    config = settings(data__train_rows=100)
    runs = [train(config.replace(method__kind=m), tmp_path / m, splits=()) for m in METHODS]
    assert len({run.manifest["order_hash"] for run in runs}) == 1
    other = train(config.replace(training__seed=1), tmp_path / "other", splits=())
    assert other.manifest["order_hash"] != runs[0].manifest["order_hash"]


def test_predictions_are_a_row_an_example(trained):
    run = trained()
    rows = run.predictions("test")
    metrics = run.metrics("test")
    assert len(rows) == metrics["rows"]
    right = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    assert right == pytest.approx(metrics["metrics"]["accuracy"]["mean"])
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)


def test_other_rows_are_scored_with_the_runs_columns_and_labels(trained, tmp_path):
    run = trained()
    other = tmp_path / "other.csv"
    other.write_text("text,label\nbright warm film,1\ndull cold plot,0\n")
    document = loralab.evaluate(run, data=str(other))
    assert document["rows"] == 2
    assert document["data"] == str(other)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("txt,label\nbright,1\ndull,0\n")
    with pytest.raises(DataError, match="text"):
        loralab.evaluate(run, data=str(wrong))


def test_generate_classifies_a_prompt(trained):
    answer = loralab.generate(trained(), "a clever moving story")
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_an_existing_folder_is_never_touched(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        train(settings(), tmp_path / "run")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method__targets": ["query", "qkv"]}, TargetError, "qkv"),
        ({"method__frozen_layers": 9, "method__kind": "frozen"}, ModelError, "has 2"),
        ({"training__device": "cuda:99"}, ConfigError, "not on this machine"),
        ({"training__sinks": ["wandb"]}, ConfigError, "not installed"),
        ({"data__label": "stars"}, DataError, "stars"),
        ({"model__num_labels": 2, "data__train": "missing.csv"}, DataError, r"missing\.csv"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes, error, words, settings, tmp_path
):
    with pytest.raises(error, match=words):
        train(settings(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match="is no run"):
        open_run(tmp_path)


def test_the_command_line_trains_and_speaks_json(settings, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(settings().to_toml())
    assert main(["train", str(recipe), "--output", str(tmp_path / "run"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["state"] == "finished"
    assert summary["evaluation"]["test"]["metrics"]["accuracy"]["mean"] > 0.6
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "run"), "bright"]) == 0
    assert main(["doctor", str(recipe), "--json"]) == 0
    assert "findings" not in capsys.readouterr().err
