"""Every rule finds its fault and nothing else; the shipped descriptions are as they should be."""

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from loralab.cli import main
from loralab.config import load_config, shipped_recipes
from loralab.errors import ConfigError
from loralab.evidence.linting import RULES, lint, parse_description
from loralab.runs.folder import Run
from loralab.runs.lint import of_comparison, of_recipe, of_runs, read_experiment

DESCRIPTIONS = resources.files("loralab") / "recipes" / "experiments"


def described(name: str) -> dict[str, Any]:
    return tomllib.loads((DESCRIPTIONS / f"{name}.toml").read_text(encoding="utf-8"))


def found(tables: dict[str, Any]) -> set[str]:
    return {finding.name for finding in lint(parse_description(tables, "it"))}


def test_the_described_experiment_has_its_faults() -> None:
    findings = lint(parse_description(described("llama-imdb-two-arms"), "it"))
    names = {finding.name for finding in findings}
    assert names >= {
        "stand-in",
        "untuned-rate",
        "head-rates-differ",
        "warmup-too-long",
        "one-seed",
        "frozen-below-trained",
        "data-order-differs",
        "dropout-in-one-arm",
        "last-checkpoint",
        "undertrained",
        "clip-norm-over-sizes",
        "predictions-not-saved",
        "difference-untested",
        "part-of-the-test-set",
        "cost-setting",
        "oom-under-foreach",
        "skipped-counts-as-failed",
        "never-run",
        "ratio-of-an-attempt",
        "accuracy-over-parameters",
        "saving-not-shown",
        "regularisation-unshown",
        "layer-count",
        "floating-versions",
        "results-by-time",
        "evidence-missing",
        "small-sample",
    }
    told = {finding.name: finding.evidence for finding in findings}
    assert "mean before any decay is 25%" in told["warmup-too-long"]
    assert "18.42 GiB, with it 23.02 GiB of 22.07" in told["oom-under-foreach"]
    assert "± 3.1 points" in told["small-sample"]
    assert "75% of them, not 55%" in told["layer-count"]
    assert all(f.evidence and f.next_step and f.message for f in findings)
    assert [f.level for f in findings] == sorted((f.level for f in findings), key=_severity)


def _severity(level: str) -> int:
    return ("error", "warning", "info").index(level)


def test_the_clean_experiment_has_none() -> None:
    assert found(described("clean-two-arms")) == set()


def arm(tables: dict[str, Any], index: int, **changes: Any) -> None:
    tables["arms"][index] |= changes


CASES: dict[str, Any] = {
    "warmup-too-long": lambda t: arm(t, 0, warmup_steps=200),
    "untuned-rate": lambda t: arm(t, 0, rates_tried=[1e-5]),
    "rate-at-edge": lambda t: arm(t, 0, learning_rate=3e-5),
    "head-rates-differ": lambda t: arm(t, 0, head_learning_rate=1e-5),
    "frozen-below-trained": lambda t: arm(t, 0, frozen_layers=4),
    "one-seed": lambda t: arm(t, 1, seeds=[0]),
    "last-checkpoint": lambda t: arm(t, 1, restored="last"),
    "undertrained": lambda t: arm(t, 1, loss=0.5),
    "stand-in": lambda t: arm(t, 1, stands_for="Full fine-tuning"),
    "dropout-in-one-arm": lambda t: arm(t, 1, adapter_dropout=0.1),
    "data-order-differs": lambda t: arm(t, 1, data_order="other"),
    "steps-differ": lambda t: arm(t, 1, steps=300),
    "batch-differs": lambda t: arm(t, 1, batch_size=2),
    "layer-count": lambda t: t.update(stated_layers=22),
    "selected-on-test": lambda t: t.update(selected_on="test"),
    "predictions-not-saved": lambda t: t.update(predictions_saved=False),
    "floating-versions": lambda t: t.update(versions="floating"),
    "results-by-time": lambda t: t.update(results_found_by="modification time"),
    "evidence-missing": lambda t: t.update(missing_files=["a.md"]),
    "difference-untested": lambda t: t["claims"][0].update(tested=False, against=None),
    "below-detectable": lambda t: t["claims"][0].pop("tested"),
    "part-of-the-test-set": lambda t: t["data"].update(test_rows=20000),
    "cost-setting": lambda t: t["data"].update(padding="max_tokens"),
    "saving-not-shown": lambda t: arm(t, 1, seconds=609.0),
    "small-sample": lambda t: t["claims"][2].update(rows=500),
    "never-run": lambda t: t["claims"][1].update(ran=False),
    "skipped-counts-as-failed": lambda t: t["claims"][1].update(
        counted_as_failed_when_skipped=True
    ),
    "accuracy-over-parameters": lambda t: t["claims"].append(
        {"kind": "parameter-efficiency", "text": "48 times"}
    ),
    "ratio-of-an-attempt": lambda t: t["claims"].append(
        {"kind": "larger-batch", "text": "8 times", "found_maximum": False}
    ),
    "oom-under-foreach": lambda t: t["claims"].append(
        {"kind": "out-of-memory", "text": "fails", "optimizer_path": "foreach"}
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_one_fault_gives_its_finding_and_no_other(rule: str) -> None:
    tables = described("clean-two-arms")
    CASES[rule](tables)
    assert found(tables) == {rule}


def test_rank_and_scale_are_told_apart() -> None:
    def two(**second: Any) -> set[str]:
        tables = described("clean-two-arms")
        tables["claims"] = []
        first = {**tables["arms"][1], "name": "rank 16", "rates_tried": None}
        tables["arms"] = [first, {**first, "name": "rank 64", "rank": 64, **second}]
        return found(tables)

    assert two() == set()  # alpha/rank keeps the first step
    assert two(alpha=128.0) == {"rank-and-scale-changed"}
    assert two(scaling="alpha/sqrt(rank)", alpha=32.0) == {"rank-and-scale-changed"}


def test_dropout_that_is_not_told_is_not_guessed() -> None:
    tables = described("clean-two-arms")
    arm(tables, 0, method="lora", stands_for=None, adapter_dropout=None)
    arm(tables, 1, adapter_dropout=0.1)
    assert "dropout-in-one-arm" not in found(tables)
    arm(tables, 0, method="full")  # without an adapter there is none
    assert "dropout-in-one-arm" in found(tables)


def test_epochs_tell_who_trained_longer_where_no_steps_are_told() -> None:
    tables = described("clean-two-arms")
    arm(tables, 0, epochs=3.0)
    assert "steps-differ" not in found(tables)
    for index in (0, 1):
        arm(tables, index, steps=None, warmup_steps=None)
    assert found(tables) == {"steps-differ"}


def test_two_rates_are_too_few_and_have_their_best_at_an_edge() -> None:
    tables = described("clean-two-arms")
    arm(tables, 1, rates_tried=[1e-4, 3e-4])
    assert found(tables) == {"few-rates", "rate-at-edge"}
    arm(tables, 1, rates_tried=[1e-4, 3e-4, 1e-3])
    assert found(tables) == set()


def test_one_clipping_norm_is_told_only_where_no_rate_was_swept_under_it() -> None:
    tables = described("clean-two-arms")
    for index in (0, 1):
        arm(tables, index, rates_tried=None)
    assert "clip-norm-over-sizes" in found(tables)
    arm(tables, 1, max_grad_norm=0.1)
    assert "clip-norm-over-sizes" not in found(tables)


def test_regularisation_is_shown_only_by_an_arm_that_overfits() -> None:
    tables = described("clean-two-arms")
    tables["claims"].append({"kind": "regularisation", "text": "dropout prevents overfitting"})
    assert found(tables) == set()  # training below validation: there is something to prevent
    for index in (0, 1):
        arm(tables, index, loss=0.3, validation_loss=0.2)
    assert "regularisation-unshown" in found(tables)


def test_every_rule_has_a_case() -> None:
    others = {
        "rank-and-scale-changed",
        "few-rates",
        "clip-norm-over-sizes",
        "regularisation-unshown",
    }
    assert set(RULES) == set(CASES) | others


def test_faults_of_a_description_come_all_at_once() -> None:
    tables = described("clean-two-arms")
    tables["arms"][0]["lerning_rate"] = 1.0
    tables["arms"][1]["method"] = "lore"
    with pytest.raises(ConfigError) as caught:
        parse_description(tables, "mine.toml")
    assert "mine.toml: 2 fault(s)" in caught.value.cause
    assert "did you mean 'learning_rate'?" in caught.value.cause


LANGUAGE = [name for name in shipped_recipes() if load_config(name).model.task != "image"]


@pytest.mark.parametrize("name", LANGUAGE)
def test_shipped_recipes_have_no_findings(name: str) -> None:
    assert lint(of_recipe(load_config(name), name)) == []


def test_a_recipe_with_dropout_in_one_arm_is_told(tmp_path: Path) -> None:
    config = load_config("demo", ["method.dropout=0.1", "training.warmup=0.6"])
    assert {f.name for f in lint(of_recipe(config, "demo"))} == {
        "dropout-in-one-arm",
        "warmup-too-long",
    }


def test_a_comparison_with_its_best_rate_at_the_edge_is_told() -> None:
    config = load_config("demo")

    def method(name: str, best: float) -> dict[str, Any]:
        return {
            "method": name,
            "trainable_parameters": 10,
            "total_parameters": 100,
            "best_learning_rate": best,
            "learning_rates": [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)],
            "seeds": [0, 1, 2],
            "steps": 40,
            "accuracy": {"mean": 0.8},
        }

    comparison = {
        "methods": [method("lora", 1e-2), method("full", 1e-3)],
        "winner": None,
        "verdict": "No winner",
        "data": {"test_rows": 500},
    }
    findings = lint(of_comparison(comparison, config, "runs/demo"))
    assert [f.name for f in findings] == ["rate-at-edge"]
    assert "add 3.0e-02 to its grid" in findings[0].next_step


def test_the_verb_exits_with_one_for_errors_and_zero_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["lint", "clean-two-arms"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["lint", "llama-imdb-two-arms", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["counts"]["error"] >= 10
    assert len({finding["name"] for finding in document["findings"]}) >= 20
    assert main(["lint", "nowhere"]) == 2
    assert "llama-imdb-two-arms" in capsys.readouterr().err


def test_arms_of_one_method_are_named_by_what_they_differ_in(tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> Run:
        manifest = {"state": "running", "trainable_parameters": 1, "total_parameters": 2}
        config = load_config("demo").replace(training__max_steps=3, **changes)
        return Run(tmp_path / name, config, manifest)

    runs = [run("a"), run("b", training__seed=1), run("c", method__dropout=0.1)]
    runs += [run("d", method__dropout=0.1, training__batch_size=8), run("e", method__rank=4)]
    assert [arm.name for arm in of_runs(runs).arms] == [
        "lora rank 16, dropout 0.0, batch_size 16",
        "lora rank 16, dropout 0.1, batch_size 16",
        "lora rank 16, dropout 0.1, batch_size 8",
        "lora rank 4",
    ]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    from loralab.errors import RunError

    with pytest.raises(RunError, match="no run and no comparison"):
        read_experiment([str(tmp_path)])
