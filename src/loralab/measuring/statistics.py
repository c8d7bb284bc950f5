"""Means and differences over a sample of test rows *and* a sample of seeds.

The model (`docs/statistics.md`): a score is mean + row effect + seed effect + residual, rows and
seeds crossed and both random. A difference between two methods is about new rows and new seeds, so
its error has a part from each. Rows of one document count together (cluster-robust, CR2).

References: Miller, "Adding Error Bars to Evals" (arXiv 2411.00640); Satterthwaite (1946); Holm
(1979); McNemar (1947) with the mid-p of Fagerland et al. (2013); Bell & McCaffrey (2002) and
Imbens & Kolesár (2016) for CR2 and its degrees of freedom; Agresti & Min (2005).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import special, stats

CONFIDENCE = 0.95
POWER = 0.8

Scores = Shaped[np.ndarray, "seeds items"]
Groups = Shaped[np.ndarray, " items"] | None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and rows, and how far it may be off for new seeds and new rows.

    `standard_error` is the one tests and intervals use. It counts the residual (row x seed) noise
    in the rows' part and again in the seeds' part; `expected_error` counts it once, so it is the
    smaller, nearly unbiased one, which the power of a test depends on.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float
    expected_error: float

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The t interval (low, high)."""
        half = _critical(1 - confidence, self.degrees_of_freedom) * self.standard_error
        return self.value - half, self.value + half


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """The expected score of `a` minus that of `b`, over the population of rows and seeds."""

    p: float
    low: float
    high: float

    def detectable(self, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> float:
        """The true difference that a two-sided test at `alpha` finds with probability `power`."""
        reach = _critical(alpha, self.degrees_of_freedom) * self.standard_error
        margin = float(special.stdtrit(self.degrees_of_freedom, power)) * self.expected_error
        return reach + margin

    def power(self, difference: float, alpha: float = 1 - CONFIDENCE) -> float:
        """The probability that a test at `alpha` finds a true difference of this size."""
        beyond = difference - _critical(alpha, self.degrees_of_freedom) * self.standard_error
        if self.expected_error == 0:
            return float(beyond >= 0)
        return float(special.stdtr(self.degrees_of_freedom, beyond / self.expected_error))


@dataclass(frozen=True)
class McNemar:
    """Rows that only one of two classifiers gets right, and the two-sided p-values of equality."""

    only_a: int
    only_b: int
    p_exact: float
    p_mid: float


@dataclass(frozen=True)
class CountsBound:
    """What two confusion matrices alone say about a difference in accuracy, at the very least.

    `low`, `high` and `p` hold for the pairing of rows that is least favourable to a difference.
    """

    difference: float
    low: float
    high: float
    p: float
    only_a: int
    only_b: int


def mean_over_seeds(scores: Scores, groups: Groups = None) -> Estimate:
    """The mean of `scores` (seeds, items) with both sources of its error.

    `groups` (items,) names each row's document; without it rows are independent. With one seed
    the spread between seeds is unknown, and the error is that of the rows alone.
    """
    values = np.asarray(scores, dtype=float)
    document, sizes = _documents(groups, values.shape[1])
    rows, rows_df = _rows_variance(values.mean(axis=0), document, sizes)
    seeds, residual = _seeds_variance(values, document, sizes)
    parts = [(rows + _smoothing(scores), rows_df), (seeds, len(values) - 1.0)]
    return Estimate(float(values.mean()), *_combine(parts, residual))


def paired_difference(
    a: Shaped[np.ndarray, "seeds_a items_a"],
    b: Shaped[np.ndarray, "seeds_b items_b"],
    groups: Shaped[np.ndarray, " items_a"] | None = None,
) -> PairedDifference:
    """Scores of method `a` (seeds, items) minus those of `b` on the same items.

    The rows' part is paired: the variance of the rows' differences, averaged over seeds. The
    seeds' part is not: the spreads of both methods add up, which keeps 2(S - 1) degrees of freedom
    where pairing by seed leaves S - 1, and is on the safe side when equal seeds (data order, head
    initialisation) move both methods alike. The methods may have different numbers of seeds, at
    least two each.

    Raises `ValueError` for fewer than two seeds or for different numbers of items.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a difference over seeds needs at least two seeds a method")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the methods were scored on {a.shape[1]} and {b.shape[1]} items")
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    document, sizes = _documents(groups, first.shape[1])
    gaps = first.mean(axis=0) - second.mean(axis=0)
    rows, rows_df = _rows_variance(gaps, document, sizes)
    smoothing = max(_smoothing(a), _smoothing(b))
    spread_a, residual_a = _seeds_variance(first, document, sizes)
    spread_b, residual_b = _seeds_variance(second, document, sizes)
    parts = [
        (rows + smoothing, rows_df),
        (spread_a, len(first) - 1.0),
        (spread_b, len(second) - 1.0),
    ]
    error, df, expected = _combine(parts, residual_a + residual_b)
    difference = float(gaps.mean())
    estimate = Estimate(difference, error, df, expected)
    low, high = estimate.interval()
    return PairedDifference(difference, error, df, expected, _p_value(estimate), low, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: below alpha where the step-down rejects."""
    order = np.argsort(p_values, kind="stable")
    steps = len(p_values) - np.arange(len(p_values))
    raised = np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * steps)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(raised, 1.0)
    return corrected.tolist()


def mcnemar(
    a_correct: Bool[np.ndarray, " items"], b_correct: Bool[np.ndarray, " items"]
) -> McNemar:
    """McNemar's test of two runs on the same rows.

    Valid for one run against one run on independent rows. Never pool the rows of several seeds:
    the copies of a row are not independent, and the spread between seeds is not in the test.
    """
    only_a = int(np.sum(a_correct & ~b_correct))
    only_b = int(np.sum(b_correct & ~a_correct))
    return _mcnemar(only_a, only_b)


def paired_difference_from_counts(
    a: Int[np.ndarray, "labels labels"], b: Int[np.ndarray, "labels labels"]
) -> CountsBound:
    """Accuracy of `a` minus that of `b` from their confusion matrices (rows = truth) alone.

    The rows' pairing is unknown, so the largest number of discordant rows that the matrices allow
    is assumed: in each class as many rows as possible on which only the worse one is right.
    About one run each; the spread between seeds is not in it.

    Raises `ValueError` where the matrices do not describe the same test rows.
    """
    if not np.array_equal(a.sum(axis=1), b.sum(axis=1)):
        raise ValueError("the two confusion matrices count different numbers of rows in a class")
    support = a.sum(axis=1)
    total = int(support.sum())
    right_a, right_b = np.diag(a), np.diag(b)
    only_a = int(np.minimum(right_a, support - right_b).sum())
    only_b = int(np.minimum(right_b, support - right_a).sum())
    difference = (only_a - only_b) / total
    variance = (only_a + only_b) / total**2 - difference**2 / total
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * float(np.sqrt(variance))
    p = _mcnemar(only_a, only_b).p_exact
    return CountsBound(difference, difference - half, difference + half, p, only_a, only_b)


def _mcnemar(only_a: int, only_b: int) -> McNemar:
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    tail = float(stats.binom.cdf(fewer, discordant, 0.5))
    point = float(stats.binom.pmf(fewer, discordant, 0.5))
    return McNemar(only_a, only_b, min(1.0, 2 * tail), min(1.0, 2 * tail - point))


def _documents(
    groups: Groups, num_items: int
) -> tuple[Int[np.ndarray, " items"], Float[np.ndarray, " documents"]]:
    """Each row's document as a number, and the documents' sizes in rows."""
    if groups is None:
        return np.arange(num_items), np.ones(num_items)
    _, document = np.unique(groups, return_inverse=True)
    return document, np.bincount(document).astype(float)


def _rows_variance(
    values: Float[np.ndarray, " items"],
    document: Int[np.ndarray, " items"],
    sizes: Float[np.ndarray, " documents"],
) -> tuple[float, float]:
    """Variance of the mean of `values` by CR2, and its Bell-McCaffrey degrees of freedom.

    For the mean both have a closed form in the documents' shares h of the rows; with documents of
    equal size they are the textbook variance of the documents' means and G - 1.
    """
    if len(sizes) < 2:
        return float("inf"), 1.0
    share = sizes / len(values)
    sums = np.bincount(document, weights=values - values.mean(), minlength=len(sizes))
    variance = float(np.sum(sums**2 / (1 - share))) / len(values) ** 2
    leverage = share**2 / (1 - share)
    df = 1 / (np.sum(share**2) + np.sum(leverage) ** 2 - np.sum(leverage**2))
    return variance, float(df)


def _seeds_variance(
    values: Float[np.ndarray, "seeds items"],
    document: Int[np.ndarray, " items"],
    sizes: Float[np.ndarray, " documents"],
) -> tuple[float, float]:
    """Variance of the mean that comes from seeds, and how much of it is residual noise of rows."""
    num_seeds, num_items = values.shape
    if num_seeds < 2:
        return 0.0, 0.0
    seed_means = values.mean(axis=1)
    residuals = values - values.mean(axis=0) - seed_means[:, None] + values.mean()
    num_documents = len(sizes)
    squares = sum(
        float(np.sum(np.bincount(document, weights=row, minlength=num_documents) ** 2))
        for row in residuals
    )
    correction = num_documents / max(num_documents - 1, 1) / (num_seeds - 1)
    residual = squares * correction / num_items**2
    return float(seed_means.var(ddof=1)) / num_seeds, residual / num_seeds


def _smoothing(scores: Scores) -> float:
    """Half a discordant row each way (Agresti & Min) for 0/1 scores, nothing for others.

    Without it a handful of discordant rows, all on one side, would look too certain.
    """
    binary = bool(np.all((scores == 0) | (scores == 1)))
    return 1 / scores.shape[1] ** 2 if binary else 0.0


def _combine(parts: list[tuple[float, float]], residual: float) -> tuple[float, float, float]:
    """Standard error, Satterthwaite degrees of freedom and expected error of a sum of variances.

    `parts` are (variance, degrees of freedom), the rows' part first.
    """
    rows = parts[0][0]
    total = sum(variance for variance, _ in parts)
    if total == 0 or not np.isfinite(total):
        return float(np.sqrt(total)), 1.0, float(np.sqrt(total))
    expected = rows + max(0.0, total - rows - residual)
    # A spread between few seeds is more often under- than overestimated; left alone, an unlucky
    # small one would also claim many degrees of freedom. So these count its median-unbiased value.
    cautious = [(variance * _median_correction(df), df) for variance, df in parts if variance > 0]
    whole = sum(variance for variance, _ in cautious)
    df = whole**2 / sum(variance**2 / df for variance, df in cautious)
    return float(np.sqrt(total)), df, float(np.sqrt(expected))


def _median_correction(degrees_of_freedom: float) -> float:
    """What makes a variance estimate too small as often as too large."""
    return degrees_of_freedom / float(special.chdtri(degrees_of_freedom, 0.5))


def _p_value(estimate: Estimate) -> float:
    if estimate.value == 0:
        return 1.0
    if estimate.standard_error == 0:
        return 0.0
    t = abs(estimate.value) / estimate.standard_error
    return float(2 * special.stdtr(estimate.degrees_of_freedom, -t))


def _critical(alpha: float, degrees_of_freedom: float) -> float:
    return -float(special.stdtrit(degrees_of_freedom, alpha / 2))
