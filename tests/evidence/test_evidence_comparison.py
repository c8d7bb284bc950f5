"""What `comparison.json` holds and what its verdict claims, on made-up methods."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from loralab.errors import DataError
from loralab.evidence import (
    MethodResult,
    RatePoint,
    SeedPredictions,
    TestSet,
    build_comparison,
)

ROWS = 600
GENERATOR = np.random.default_rng(8)
LABELS = GENERATOR.integers(0, 2, ROWS)
DIFFICULTY = GENERATOR.standard_normal(ROWS)
TEST = TestSet(
    ids=tuple(f"row-{index}" for index in range(ROWS)),
    groups=tuple(f"document-{index // 4}" for index in range(ROWS)),
    labels=LABELS,
    label_names=("negative", "positive"),
)
CAUSAL_TEST = dataclasses.replace(TEST, labels=None, label_names=None)
SETTINGS = {
    "data_facts": {"name": "made-up", "rows": {"test": ROWS}, "documents": {"test": ROWS // 4}},
    "settings": {"model": {"name": "tiny"}},
    "base_bytes": 1_000,
    "storage_tasks": 10,
}


def run(seed: int, level: float, *, causal: bool = False) -> SeedPredictions:
    generator = np.random.default_rng([seed, round(1000 * abs(level))])
    latent = level + DIFFICULTY + 0.3 * generator.standard_normal(ROWS)
    right = latent > 0
    predictions = right.astype(int) if causal else np.where(right, LABELS, 1 - LABELS)
    return SeedPredictions(seed, predictions, np.logaddexp(0, -latent))


def method(name: str, level: float = 1.0, *, causal: bool = False, **changes: Any) -> MethodResult:
    result = MethodResult(
        method=name,
        trainable_parameters=1_000,
        total_parameters=9_000,
        rates=tuple(RatePoint(rate, 0.4, 0.8, f"{name}-{rate}") for rate in (1e-4, 3e-4, 1e-3)),
        best_learning_rate=3e-4,
        bracketed=True,
        seeds=tuple(run(seed, level, causal=causal) for seed in range(3)),
        peak_bytes=2**20,
        step_seconds=0.25,
        artifact_bytes=40,
        artifact_needs_base=True,
        steps=120,
    )
    return dataclasses.replace(result, **changes)


def compare(*results: MethodResult, test: TestSet = TEST) -> dict[str, Any]:
    comparison = build_comparison(results, test, **SETTINGS)
    return json.loads(json.dumps(comparison, allow_nan=False))  # it is plain, strict JSON


def test_every_promised_key_is_there():
    comparison = compare(method("lora"), method("full", 1.1), method("head", 0.4))
    assert {"winner", "verdict", "steps", "data", "pairs", "nll_pairs"} <= set(comparison)
    keys = "method trainable_parameters total_parameters learning_rates best_learning_rate"
    keys += " bracketed seeds accuracy nll peak_bytes step_seconds artifact_bytes macro_f1"
    keys += " per_class confusion_matrix per_seed"
    for entry in comparison["methods"]:
        assert set(keys.split()) <= set(entry)
        for figure in ("accuracy", "nll", "macro_f1"):
            assert entry[figure]["low"] < entry[figure]["mean"] < entry[figure]["high"]
        assert [point["validation_nll"] for point in entry["learning_rates"]] == [0.4] * 3
        assert entry["seeds"] == [seed["seed"] for seed in entry["per_seed"]] == [0, 1, 2]
        assert np.sum(entry["confusion_matrix"]) == 3 * ROWS
    for pairs in (comparison["pairs"], comparison["nll_pairs"]):
        assert [(pair["a"], pair["b"]) for pair in pairs] == [
            ("lora", "full"),
            ("lora", "head"),
            ("full", "head"),
        ]
        for pair in pairs:
            assert {"difference", "low", "high", "p", "detectable_difference"} <= set(pair)
            assert pair["p"] >= pair["p_raw"]
    assert comparison["data"]["rows"] == {"test": ROWS}
    assert comparison["data"]["test_documents"] == 150
    assert comparison["steps"] == 120


def test_differences_are_those_of_the_means():
    comparison = compare(method("lora"), method("full", 1.2))
    lora, full = comparison["methods"]
    for figure, pairs in (("accuracy", "pairs"), ("nll", "nll_pairs")):
        expected = lora[figure]["mean"] - full[figure]["mean"]
        assert comparison[pairs][0]["difference"] == pytest.approx(expected)


def test_a_clear_winner_is_named_with_its_lead():
    comparison = compare(method("head", 0.0), method("lora", 1.5), method("full", 0.7))
    assert comparison["winner"] == "lora"
    verdict = comparison["verdict"]
    assert verdict.startswith("lora wins: on 600 test rows (150 documents), with 3 seeds of 120")
    assert "points ahead of full in accuracy (95 % interval" in verdict
    assert "better than every other (Holm-corrected p at most" in verdict
    assert verdict.count(".\n") == 0 and verdict.endswith(".")


def test_a_contest_of_two_needs_no_every_other():
    comparison = compare(method("lora", 1.5), method("full", 0.7))
    assert comparison["winner"] == "lora"
    assert "every other" not in comparison["verdict"] and "(p = " in comparison["verdict"]


def test_equals_have_no_winner_and_the_verdict_says_what_would_have_shown():
    comparison = compare(method("lora"), method("full", 1.01), method("frozen", 0.99))
    assert comparison["winner"] is None
    verdict = comparison["verdict"]
    assert verdict.startswith("No winner: on 600 test rows (150 documents), with 3 seeds of 120")
    assert "the smallest lead that would have shown in 80 % of repeats is" in verdict


def test_the_verdict_compares_with_the_best_that_was_not_beaten():
    """The second best is beaten; the third, whose seeds differ widely, is not."""
    wide = tuple(run(seed, level) for seed, level in enumerate((-0.8, 0.2, 1.5)))
    comparison = compare(method("lora", 1.5), method("head", 0.6), method("full", seeds=wide))
    assert comparison["winner"] is None
    verdict = comparison["verdict"]
    assert "ahead of full in accuracy" in verdict
    assert "too little to tell them apart, though lora does beat head" in verdict
    assert "the smallest lead over full that would have shown" in verdict


def test_exact_ties_are_level():
    twin = method("lora")
    comparison = compare(twin, dataclasses.replace(twin, method="full"))
    assert comparison["winner"] is None
    assert comparison["pairs"][0]["p"] == 1.0
    assert "lora and full are level in accuracy" in comparison["verdict"]
    assert comparison["disagreements"] == []


def test_nobody_wins_where_a_best_rate_lies_on_the_edge():
    comparison = compare(method("lora", 1.5), method("full", 0.5, bracketed=False))
    assert comparison["winner"] is None
    expected = "No winner, because full's best learning rate, 0.0003, lies on the edge of its grid"
    assert comparison["verdict"].startswith(expected)


def test_a_method_that_diverged_at_every_rate_has_no_figures_and_no_one_wins():
    lost = method("full", seeds=(), best_learning_rate=None, bracketed=False, rates=())
    lost = dataclasses.replace(lost, diverged_rates=(1e-2, 3e-2))
    comparison = compare(method("lora", 1.5), method("head", 0.2), lost)
    assert comparison["winner"] is None
    assert "none of full's learning rates gave a finite loss" in comparison["verdict"]
    entry = comparison["methods"][2]
    assert entry["accuracy"] is None and entry["seeds"] == []
    assert [point["diverged"] for point in entry["learning_rates"]] == [True, True]
    assert len(comparison["pairs"]) == 1
    alone = compare(method("lora"), lost)
    assert alone["verdict"].endswith("which leaves only lora with figures.")
    assert alone["pairs"] == []


def test_a_seed_that_diverged_takes_the_win_away():
    broken = method("full", 0.1)
    worst = dataclasses.replace(broken.seeds[1], nll=np.full(ROWS, np.nan))
    broken = dataclasses.replace(broken, seeds=(broken.seeds[0], worst, broken.seeds[2]))
    comparison = compare(method("lora"), method("head", 0.0), broken)
    assert comparison["winner"] is None
    assert "full diverged at its best rate with seed 1" in comparison["verdict"]


def test_a_rate_without_a_finite_loss_is_marked():
    points = (RatePoint(1e-3, 0.4, 0.8, "good"), RatePoint(1e-1, float("nan"), 0.5, "lost"))
    comparison = compare(method("lora", rates=points), method("full"))
    good, lost = comparison["methods"][0]["learning_rates"]
    assert (good["diverged"], lost["diverged"], lost["validation_nll"]) == (False, True, None)


def test_a_method_with_one_answer_is_named():
    answers = tuple(
        SeedPredictions(seed, np.zeros(ROWS, dtype=int), np.full(ROWS, 0.7)) for seed in range(3)
    )
    comparison = compare(method("lora"), method("head", seeds=answers))
    assert comparison["verdict"].endswith("head gives every row the same label.")
    entry = comparison["methods"][1]
    assert entry["per_class"][1]["f1"]["mean"] == 0.0
    assert comparison["winner"] == "lora"


def test_worse_log_likelihood_takes_a_win_in_accuracy_away():
    """More right answers, and yet confident where it is wrong."""
    better = method("lora", 1.6)
    sure = tuple(dataclasses.replace(seed, nll=4 * seed.nll + 1) for seed in better.seeds)
    comparison = compare(method("full", 1.0), dataclasses.replace(better, seeds=sure))
    assert comparison["pairs"][0]["better"] == "lora"
    assert comparison["nll_pairs"][0]["better"] == "full"
    assert comparison["winner"] is None
    assert "but significantly worse than full in log-likelihood" in comparison["verdict"]


def test_causal_tasks_are_decided_by_log_likelihood():
    results = (method("lora", 1.5, causal=True), method("full", 1.0, causal=True))
    comparison = compare(*results, test=CAUSAL_TEST)
    assert comparison["primary"] == "nll" and comparison["winner"] == "lora"
    assert "nats a row ahead of full in log-likelihood" in comparison["verdict"]
    assert "confusion_matrix" not in comparison["methods"][0]
    exact = np.mean([seed.predictions.mean() for seed in results[0].seeds])
    assert comparison["methods"][0]["accuracy"]["mean"] == pytest.approx(exact)


def test_rows_without_documents_say_so():
    lone = dataclasses.replace(TEST, groups=TEST.ids)
    comparison = compare(method("lora"), method("full", 1.01), test=lone)
    assert "on 600 test rows, with" in comparison["verdict"]


def test_mcnemar_is_told_seed_by_seed():
    comparison = compare(method("lora"), method("full", 1.3), method("head", 0.1))
    tables = comparison["mcnemar"]
    assert [(t["a"], t["b"], t["seed"]) for t in tables[:3]] == [
        ("lora", "full", seed) for seed in range(3)
    ]
    assert len(tables) == 9
    for table in tables[:3]:
        first, second = (right_answers(m)[table["seed"]] for m in (1.0, 1.3))
        assert table["only_a"] == np.sum(first & ~second)


def right_answers(level: float) -> list[np.ndarray]:
    return [run(seed, level).predictions == LABELS for seed in range(3)]


def test_disagreements_are_rows_whose_majorities_differ():
    comparison = compare(method("lora"), method("full", 1.4))
    assert 0 < len(comparison["disagreements"]) <= 6
    for row in comparison["disagreements"]:
        index = TEST.ids.index(row["id"])
        said = {answer["prediction"] for answer in row["predictions"].values()}
        assert said == {0, 1}
        assert row["label_name"] == TEST.label_names[LABELS[index]]
        for answer in row["predictions"].values():
            assert answer["correct"] == (answer["prediction"] == LABELS[index])


def test_storage_and_parameter_efficiency():
    comparison = compare(
        method("lora", artifact_bytes=40),
        method("full", artifact_bytes=1_000, artifact_needs_base=False),
    )
    lora, full = comparison["storage"]["rows"]
    assert lora["total_bytes"] == 1_000 + 10 * 40
    assert full["total_bytes"] == comparison["storage"]["full_models_bytes"] == 10_000
    efficiency = comparison["parameter_efficiency"]
    accuracy = comparison["methods"][0]["accuracy"]["mean"]
    told = efficiency["rows"][0]["accuracy_per_million_parameters"]
    assert told == pytest.approx(accuracy * 1_000)
    assert "a coin flip with one parameter" in efficiency["refutation"]


def test_all_faults_of_the_results_come_at_once():
    short = SeedPredictions(0, np.zeros(3, dtype=int), np.zeros(3))
    stray = dataclasses.replace(run(1, 1.0), predictions=np.full(ROWS, 2))
    results = (method("lora", seeds=(short,)), method("lora", seeds=(stray, run(0, 1.0))))
    with pytest.raises(DataError) as error:
        build_comparison(results, TEST, **SETTINGS)
    text = str(error.value)
    assert "at least two methods, each with its own name" in text
    assert "lora, seed 0: 3 predictions and 3 log-likelihoods for 600 test rows" in text
    assert "lora, seed 1: a prediction is none of the 2 labels" in text
    assert "lora: one seed says nothing of the spread between seeds" in text
    assert "Next: run each method with at least two seeds" in text
