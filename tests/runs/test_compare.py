"""A whole comparison on a tiny model: its document, its reuse, its refusals."""

import gc
import json
import shutil

import pytest

from loralab.adapters import noise
from loralab.cli import main
from loralab.config import load_config
from loralab.errors import ConfigError, OutputError
from loralab.measuring.memory import live_bytes
from loralab.runs import solo
from loralab.runs.compare import compare
from loralab.runs.tables import comparison_table

pytestmark = pytest.mark.xdist_group("comparison")  # one worker makes what its tests share

METHOD_KEYS = {
    "method",
    "trainable_parameters",
    "total_parameters",
    "learning_rates",
    "best_learning_rate",
    "bracketed",
    "seeds",
    "accuracy",
    "nll",
    "peak_bytes",
    "step_seconds",
    "artifact_bytes",
}
PAIR_KEYS = {"a", "b", "difference", "low", "high", "p", "detectable_difference"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """One comparison of all four methods, shared by the tests that only read it.

    Three of them are measured in this process, which has its imports behind it.
    """
    tiny, rows = request.getfixturevalue("tiny_model"), request.getfixturevalue("rows_csv")
    folder = tmp_path_factory.mktemp("comparison") / "contest"
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        f"""
        [model]
        name = "{tiny}"
        pooling = "mean"
        [data]
        train = "{rows}"
        max_tokens = 32
        train_rows = 200
        [method]
        rank = 4
        frozen_layers = 1
        [training]
        batch_size = 16
        epochs = 1
        threads = 1
        cache_frozen_prefix = true
        [compare]
        measured_steps = 2
        max_extensions = 1
        [compare.learning_rates]
        head = [3e-2, 3e-1]
        lora = [1e-3, 1e-2, 1e-1]
        frozen = [1e-3, 1e-2]
        full = [1e-3, 1e-2]
        """
    )
    config = load_config(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loralab.runs.compare.measure", measured)
        return config, folder, compare(config, folder)


def measured(config, *, num_steps):
    place = solo.measure if config.method.kind == "lora" else solo.measure_here
    return place(config, num_steps=num_steps)


def test_the_document_has_what_it_promises(finished):
    config, folder, comparison = finished
    assert json.loads((folder / "comparison.json").read_text()) == comparison
    methods = {row["method"]: row for row in comparison["methods"]}
    assert set(methods) == set(config.compare.methods)
    for row in methods.values():
        assert row.keys() >= METHOD_KEYS
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
        assert row["seeds"] == config.compare.seeds
        assert all(point["validation_nll"] > 0 for point in row["learning_rates"])
    for pairs in (comparison["pairs"], comparison["nll_pairs"]):
        assert len(pairs) == 6
        assert all(pair.keys() >= PAIR_KEYS for pair in pairs)
    assert comparison["winner"] in (None, *methods)
    assert comparison["verdict"].endswith(".")
    assert comparison["steps"] > 0
    assert methods["full"]["trainable_parameters"] == methods["full"]["total_parameters"]
    assert methods["head"]["trainable_parameters"] == 66
    assert methods["head"]["artifact_bytes"] < methods["lora"]["artifact_bytes"]
    assert methods["lora"]["artifact_bytes"] < methods["full"]["artifact_bytes"]


def test_peak_memory_is_ordered_as_the_methods_are(finished):
    peaks = {row["method"]: row["peak_bytes"] for row in finished[2]["methods"]}
    assert peaks["head"] < peaks["frozen"] < peaks["full"]


def test_a_fresh_process_takes_as_many_bytes_as_this_one(finished):
    """Of which the first was the one that measured LoRA; here other things live, too."""
    _, folder, comparison = finished
    [lora] = [row for row in comparison["methods"] if row["method"] == "lora"]
    config = load_config(next((folder / "runs" / "lora").glob("*/config.toml")))
    noise._table.cache_clear()  # a fresh process has no table of coin flips
    gc.collect()
    others = live_bytes()
    here = solo.measure_here(config, num_steps=1)
    assert lora["peak_bytes"] == pytest.approx(here["peak_bytes"] - others, rel=0.01)


def test_the_head_rate_is_swept_first_and_shared(finished):
    _, folder, comparison = finished
    best = next(row for row in comparison["methods"] if row["method"] == "head")
    for manifest in folder.glob("runs/*/*/config.toml"):
        run = load_config(manifest)
        if run.method.kind != "head":
            assert run.training.head_learning_rate == best["best_learning_rate"]


def test_every_run_saw_the_same_order_and_only_winners_saw_the_test_rows(finished):
    config, folder, comparison = finished
    rates = {row["method"]: row["best_learning_rate"] for row in comparison["methods"]}
    orders = {}
    for run in folder.glob("runs/*/*"):
        settings = load_config(run / "config.toml")
        manifest = json.loads((run / "manifest.json").read_text())
        orders.setdefault(settings.training.seed, set()).add(manifest["order_hash"])
        is_best = settings.training.learning_rate == rates[settings.method.kind]
        assert (run / "evaluation" / "test.json").is_file() == is_best
    assert all(len(hashes) == 1 for hashes in orders.values())
    assert len(orders) == len(config.compare.seeds)


def test_a_finished_comparison_is_returned_without_training(finished, monkeypatch):
    config, folder, comparison = finished
    monkeypatch.setattr("loralab.runs.compare.train", None)
    monkeypatch.setattr("loralab.runs.compare.open_workbench", None)
    assert compare(config, folder) == comparison


def test_a_started_comparison_reuses_every_finished_run(finished, tmp_path, monkeypatch):
    config, folder, comparison = finished
    copy = tmp_path / "contest"
    shutil.copytree(folder, copy)
    (copy / "comparison.json").unlink()
    monkeypatch.setattr("loralab.runs.compare.train", None)
    monkeypatch.setattr("loralab.runs.compare.measure", None)
    again = compare(config, copy)
    assert again["methods"] == comparison["methods"]
    assert again["verdict"] == comparison["verdict"]


def test_other_settings_are_refused_and_named(finished):
    config, folder, _ = finished
    with pytest.raises(OutputError, match=r"training\.epochs: 1 there, 3 here"):
        compare(config.replace(training__epochs=3), folder)


def test_a_folder_of_something_else_is_refused(finished, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no comparison"):
        compare(finished[0], tmp_path)


def test_causal_models_have_no_head_method(finished, tmp_path):
    config = finished[0].replace(model__task="causal", data__prompt="text")
    with pytest.raises(ConfigError, match="no task head"):
        compare(config, tmp_path / "causal")


def test_the_table_and_the_paths_are_printed(finished, capsys):
    _, folder, comparison = finished
    columns, rows = comparison_table(comparison)
    assert len(rows) == 4
    assert all(len(row) == len(columns) for row in rows)
    assert main(["compare", str(folder / "config.toml"), "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder / "comparison.json") in out
    assert str(folder / "report.html") in out
    assert comparison["verdict"].split()[0] in out


def test_a_method_that_diverged_has_a_row_without_figures(finished):
    comparison = json.loads(json.dumps(finished[2]))
    lost = {"accuracy": None, "nll": None, "best_learning_rate": None, "seeds": []}
    comparison["methods"][0] |= lost
    _, rows = comparison_table(comparison)
    assert rows[0][1:3] == ("—", "—")
    assert rows[0][3].startswith("—")
