"""Laws of the means and differences over rows and seeds."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from loralab.measuring import (
    holm,
    mcnemar,
    mean_over_seeds,
    paired_difference,
    paired_difference_from_counts,
)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(5)


def test_one_run_on_independent_rows_gives_the_textbook_interval(generator):
    values = generator.standard_normal((1, 200))
    estimate = mean_over_seeds(values)
    assert estimate.standard_error == pytest.approx(stats.sem(values[0]))
    assert estimate.degrees_of_freedom == pytest.approx(199)
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values[0]))
    assert estimate.interval() == pytest.approx(expected)


def test_documents_of_one_size_count_as_their_means(generator):
    values = generator.standard_normal((1, 30, 4)) + generator.standard_normal((1, 30, 1))
    estimate = mean_over_seeds(values.reshape(1, 120), np.repeat(np.arange(30), 4))
    assert estimate.standard_error == pytest.approx(stats.sem(values[0].mean(axis=1)))
    assert estimate.degrees_of_freedom == pytest.approx(29)


def test_unequal_documents_give_fewer_degrees_of_freedom(generator):
    """Closed forms of CR2 and Bell-McCaffrey against their matrices, spelled out."""
    sizes = np.array([1, 2, 3, 5, 8, 13])
    groups = np.repeat(np.arange(6), sizes)
    values = generator.standard_normal((1, 32))
    ones = np.ones((32, 1))
    annihilator = np.eye(32) - ones @ ones.T / 32
    residuals = annihilator @ values[0]
    variance, columns = 0.0, []
    for document in range(6):
        inside = groups == document
        block = annihilator[np.ix_(inside, inside)]
        eigenvalues, vectors = np.linalg.eigh(block)
        root = vectors @ np.diag(eigenvalues**-0.5) @ vectors.T
        weights = root @ np.ones(sizes[document]) / 32
        variance += (weights @ residuals[inside]) ** 2
        columns.append(annihilator[:, inside] @ weights)
    gram = np.array(columns) @ np.array(columns).T
    estimate = mean_over_seeds(values, groups)
    assert estimate.standard_error**2 == pytest.approx(variance)
    assert estimate.degrees_of_freedom == pytest.approx(np.trace(gram) ** 2 / np.sum(gram**2))


def test_seeds_that_agree_add_nothing_to_the_error_of_the_rows(generator):
    row = generator.standard_normal(150)
    other = generator.standard_normal(150)
    difference = paired_difference(np.tile(row, (3, 1)), np.tile(other, (3, 1)))
    oracle = stats.ttest_rel(row, other)
    assert difference.p == pytest.approx(oracle.pvalue)
    assert (difference.low, difference.high) == pytest.approx(oracle.confidence_interval())


def test_rows_that_agree_leave_the_spread_between_seeds(generator):
    """Every row the same: what is left is Welch's test of the seeds' means, made more careful."""
    first, second = generator.standard_normal(4), 3 + generator.standard_normal(4)
    a, b = (np.repeat(seeds[:, None], 50, axis=1) for seeds in (first, second))
    difference = paired_difference(a, b)
    oracle = stats.ttest_ind(first, second, equal_var=False)
    assert difference.value / difference.standard_error == pytest.approx(oracle.statistic)
    assert difference.degrees_of_freedom == pytest.approx(oracle.df)
    assert difference.p == pytest.approx(oracle.pvalue)


def test_expected_error_is_the_truth_on_average():
    """Over repeated experiments the expected error matches the spread of the difference."""
    generator = np.random.default_rng(1)
    values, squares = [], []
    for _ in range(1500):
        shared = generator.standard_normal((1, 60))
        a, b = (
            shared
            + 0.7 * generator.standard_normal((1, 60))
            + generator.standard_normal((3, 60))
            + 0.3 * generator.standard_normal((3, 1))
            for _ in range(2)
        )
        difference = paired_difference(a, b)
        values.append(difference.value)
        squares.append((difference.expected_error**2, difference.standard_error**2))
    expected, cautious = np.mean(squares, axis=0)
    assert np.var(values) == pytest.approx(expected, rel=0.1)
    assert cautious > expected


def test_swapping_the_methods_turns_the_difference_round(generator):
    a = generator.random((3, 80)) < 0.8
    b = generator.random((4, 80)) < 0.7
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.value == pytest.approx(-other.value)
    assert one.p == pytest.approx(other.p)
    assert one.low == pytest.approx(-other.high)


def test_equal_scores_are_no_difference_and_one_lucky_row_is_none_either():
    equal = np.ones((3, 40), dtype=bool)
    assert paired_difference(equal, equal).p == 1.0
    luckier = equal.copy()
    unlucky = equal.copy()
    unlucky[:, :2] = False
    difference = paired_difference(luckier, unlucky)
    assert difference.p > 0.1
    assert math.isfinite(difference.detectable())


def test_power_at_the_detectable_difference_is_eighty_percent(generator):
    a, b = generator.random((3, 200)) < 0.8, generator.random((3, 200)) < 0.8
    difference = paired_difference(a, b)
    for alpha in (0.05, 0.05 / 6):
        assert difference.power(difference.detectable(alpha), alpha) == pytest.approx(0.8)


def test_faults_of_the_scores_are_named():
    scores = np.zeros((1, 10))
    with pytest.raises(ValueError, match="at least two seeds"):
        paired_difference(scores, scores)
    with pytest.raises(ValueError, match="10 and 9 items"):
        paired_difference(np.zeros((2, 10)), np.zeros((2, 9)))


def _holm_by_hand(p_values: list[float], alpha: float) -> list[bool]:
    """Holm's procedure as he wrote it: step down from the smallest until one is kept."""
    rejected = [False] * len(p_values)
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > alpha / (len(p_values) - step):
            break
        rejected[index] = True
    return rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_step_down_rejects(p_values, alpha):
    corrected = holm(p_values)
    for index, rejected in enumerate(_holm_by_hand(p_values, alpha)):
        if abs(corrected[index] - alpha) > 1e-12:
            assert (corrected[index] < alpha) == rejected


def test_mcnemar_agrees_with_the_binomial_test():
    a = np.array([True] * 30 + [True] * 12 + [False] * 4 + [False] * 9)
    b = np.array([True] * 30 + [False] * 12 + [True] * 4 + [False] * 9)
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (12, 4)
    assert result.p_exact == pytest.approx(stats.binomtest(4, 16).pvalue)
    assert result.p_mid == pytest.approx(result.p_exact - stats.binom.pmf(4, 16, 0.5))
    assert mcnemar(a, a).p_exact == 1.0


def test_published_confusion_matrices_bound_the_difference():
    """The seed experiment's own matrices: its sampling noise is excluded however rows pair up."""
    baseline = np.array([[1003, 240], [81, 1176]])
    lora = np.array([[1141, 102], [52, 1205]])
    bound = paired_difference_from_counts(lora, baseline)
    assert bound.difference == pytest.approx(0.0668)
    assert (bound.only_a, bound.only_b) == (321, 154)
    assert bound.p == pytest.approx(1.4e-14, rel=0.05)
    assert 0.049 < bound.low < 0.051 < 0.083 < bound.high < 0.085


def test_the_bound_is_the_worst_of_all_pairings():
    a, b = np.array([[3, 1], [1, 2]]), np.array([[1, 3], [0, 3]])
    worst = 0.0
    for both_first in range(max(0, 3 + 1 - 4), min(3, 1) + 1):
        for both_second in range(max(0, 2 + 3 - 3), min(2, 3) + 1):
            only_a = 3 - both_first + 2 - both_second
            only_b = 1 - both_first + 3 - both_second
            worst = max(worst, stats.binomtest(only_a, only_a + only_b).pvalue)
    assert paired_difference_from_counts(a, b).p == pytest.approx(worst)


def test_matrices_of_different_rows_cannot_be_compared():
    with pytest.raises(ValueError, match="different numbers of rows"):
        paired_difference_from_counts(np.array([[3, 1], [1, 2]]), np.array([[3, 1], [2, 2]]))
