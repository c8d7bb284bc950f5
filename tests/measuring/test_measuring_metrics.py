"""Laws of the metrics: known values, and intervals that cover what they should."""

import numpy as np
import pytest
from scipy import stats

from loralab.measuring import (
    classification_metrics,
    completion_metrics,
    confusion_matrix,
    wilson,
)


def brute_force_f1(labels, predictions, label):
    right = sum(p == t == label for t, p in zip(labels, predictions, strict=True))
    told = sum(p == label for p in predictions)
    true = sum(t == label for t in labels)
    precision = right / told if told else 0.0
    recall = right / true if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


@pytest.fixture
def run():
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, 240)
    wrong = generator.random((3, 240)) < 0.25
    predictions = np.where(wrong, generator.integers(0, 3, (3, 240)), labels)
    return labels, predictions, generator.gamma(1, 0.4, (3, 240))


def test_wilson_gives_the_published_intervals():
    assert wilson(2179, 2500) == pytest.approx((0.8579, 0.8841), abs=5e-5)
    assert wilson(2346, 2500) == pytest.approx((0.9283, 0.9472), abs=5e-5)
    assert wilson(0, 20)[0] == 0.0 < wilson(0, 20)[1]
    oracle = stats.binomtest(7, 31).proportion_ci(method="wilson")
    assert wilson(7, 31) == pytest.approx((oracle.low, oracle.high))


def test_every_figure_of_one_run_is_the_brute_force_one(run):
    labels, predictions, nll = run
    figures = classification_metrics(labels, predictions[0], nll[0], 3)
    by_hand = [brute_force_f1(labels, predictions[0], label) for label in range(3)]
    for entry, values in zip(figures["per_class"], by_hand, strict=True):
        told = [entry[key]["mean"] for key in ("precision", "recall", "f1")]
        assert told == pytest.approx(list(values))
        assert entry["support"] == np.sum(labels == entry["label"])
    assert figures["macro_f1"]["mean"] == pytest.approx(np.mean([f1 for _, _, f1 in by_hand]))
    assert figures["nll"]["mean"] == pytest.approx(nll[0].mean())
    right = int(np.sum(labels == predictions[0]))
    accuracy = figures["accuracy"]
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(wilson(right, 240))
    assert figures["confusion_matrix"] == confusion_matrix(labels, predictions[0], 3).tolist()


def test_confusion_matrix_has_the_truth_in_rows():
    matrix = confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]


def test_figures_over_seeds_are_means_of_the_seeds_figures(run):
    labels, predictions, nll = run
    together = classification_metrics(labels, predictions, nll, 3)
    alone = [classification_metrics(labels, predictions[s], nll[s], 3) for s in range(3)]
    for key in ("accuracy", "nll", "macro_f1"):
        expected = np.mean([figures[key]["mean"] for figures in alone])
        assert together[key]["mean"] == pytest.approx(expected)
    assert together["per_seed"] == [figures["per_seed"][0] for figures in alone]
    summed = np.sum([figures["confusion_matrix"] for figures in alone], axis=0)
    assert together["confusion_matrix"] == summed.tolist()


def test_the_same_predictions_give_the_same_intervals(run):
    labels, predictions, nll = run
    groups = np.arange(240) // 6
    one = classification_metrics(labels, predictions, nll, 3, groups)
    assert one == classification_metrics(labels, predictions, nll, 3, groups)


def test_documents_of_one_row_change_next_to_nothing(run):
    labels, predictions, nll = run
    plain = classification_metrics(labels, predictions, nll, 3, resamples=20_000)
    documents = classification_metrics(
        labels, predictions, nll, 3, np.arange(240), resamples=20_000
    )
    for key in ("accuracy", "nll", "macro_f1"):
        assert list(plain[key].values()) == pytest.approx(list(documents[key].values()), abs=2e-3)


def test_repeated_rows_of_a_document_bring_no_certainty(run):
    """Ten copies of each row, named as one document, tell as much as the row alone."""
    labels, predictions, nll = run
    once = classification_metrics(labels, predictions, nll, 3, np.arange(240), resamples=4000)
    copies = classification_metrics(
        labels.repeat(10),
        predictions.repeat(10, axis=1),
        nll.repeat(10, axis=1),
        3,
        np.arange(240).repeat(10),
        resamples=4000,
    )
    for key in ("accuracy", "nll", "macro_f1"):
        width = [figures[key]["high"] - figures[key]["low"] for figures in (once, copies)]
        assert width[0] == pytest.approx(width[1], rel=0.05)


def test_a_model_that_says_one_class_only(run):
    labels, _, nll = run
    figures = classification_metrics(labels, np.zeros(240, dtype=int), nll[0], 3)
    first, second, _ = figures["per_class"]
    assert first["recall"]["mean"] == 1.0 > first["recall"]["low"] > 0.9
    assert second["f1"]["mean"] == second["f1"]["low"] == 0.0 < second["f1"]["high"] < 0.1
    assert second["precision"] == {"mean": 0.0, "low": 0.0, "high": 1.0}


def test_one_document_leaves_the_intervals_open(run):
    labels, predictions, nll = run
    figures = classification_metrics(labels, predictions, nll, 3, np.zeros(240, dtype=int))
    assert (figures["nll"]["low"], figures["nll"]["high"]) == (None, None)
    assert (figures["accuracy"]["low"], figures["accuracy"]["high"]) == (0.0, 1.0)


def truth_and_run(generator, rows, seeds):
    """Rows with a difficulty, seeds with a shift: macro F1 and accuracy differ from run to run."""
    labels = (generator.random(rows) < 0.3).astype(int)
    latent = 0.9 + generator.standard_normal(rows) + 0.4 * generator.standard_normal((seeds, rows))
    latent = latent + 0.15 * generator.standard_normal((seeds, 1))
    nll = np.logaddexp(0, -latent)
    return labels, np.where(latent > 0, labels, 1 - labels), nll


def test_intervals_cover_the_truth_over_new_rows_and_new_seeds():
    generator = np.random.default_rng(11)
    labels, predictions, nll = truth_and_run(generator, 1_500, 600)
    truth = classification_metrics(labels, predictions, nll, 2, resamples=20)
    cases, covered = 250, dict.fromkeys(("accuracy", "nll", "macro_f1", "f1"), 0)
    for _ in range(cases):
        figures = classification_metrics(*truth_and_run(generator, 250, 3), 2, resamples=200)
        for key in covered:
            one, true = (
                f["per_class"][1]["f1"] if key == "f1" else f[key] for f in (figures, truth)
            )
            covered[key] += one["low"] <= true["mean"] <= one["high"]
    # 0.91 is 0.95 less three standard errors of 250 cases; the truth itself is known to 0.01
    assert all(count / cases > 0.9 for count in covered.values()), covered


def test_completions_have_no_classes_and_perplexity_goes_by_tokens():
    generator = np.random.default_rng(2)
    nll, tokens = generator.gamma(2, 0.5, (3, 50)), generator.integers(1, 9, 50)
    figures = completion_metrics(nll < 0.5, nll, tokens)
    expected = np.exp((nll * tokens).sum() / tokens.sum() / 3)
    assert figures["perplexity"]["mean"] == pytest.approx(expected)
    assert figures["perplexity"]["low"] < expected < figures["perplexity"]["high"]
    assert figures["accuracy"]["mean"] == pytest.approx((nll < 0.5).mean())
    assert "perplexity" not in completion_metrics(nll < 0.5, nll)
