"""What a method scored on the test rows, every figure with its 95 % interval.

Predictions are (items,) for one run or (seeds, items) for a method over seeds; the interval of a
mean over seeds covers new rows and new seeds (`docs/statistics.md`).
"""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from loralab.measuring.statistics import CONFIDENCE, Groups, mean_over_seeds

BOOTSTRAP_SEED = 20_411  # fixed: the same predictions always give the same intervals

Figure = Float[np.ndarray, "..."]


class Interval(TypedDict):
    """A figure with the two ends of its 95 % interval; None where one document leaves it open."""

    mean: float
    low: float | None
    high: float | None


class Counts(TypedDict):
    """Per seed and label: rows that are it, rows predicted as it, rows that are both."""

    support: Figure
    predicted: Figure
    right: Figure


def wilson(
    successes: int | float,
    trials: int | float,
    critical: float = float(stats.norm.ppf((1 + CONFIDENCE) / 2)),
) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a proportion; it never leaves [0, 1].

    `trials` may be an effective number, for rows that are not independent.
    """
    share, square = successes / trials, critical**2 / trials
    centre = (share + square / 2) / (1 + square)
    half = critical * np.sqrt(share * (1 - share) / trials + square / (4 * trials)) / (1 + square)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def confusion_matrix(
    labels: Int[np.ndarray, " items"], predictions: Int[np.ndarray, " items"], num_labels: int
) -> Int[np.ndarray, "labels labels"]:
    """Rows counted by (true label, predicted label)."""
    cells = np.bincount(labels * num_labels + predictions, minlength=num_labels**2)
    return cells.reshape(num_labels, num_labels)


def classification_metrics(
    labels: Int[np.ndarray, " items"],
    predictions: Int[np.ndarray, "*seeds items"],
    nll: Float[np.ndarray, "*seeds items"],
    num_labels: int,
    groups: Groups = None,
    *,
    resamples: int = 1000,
) -> dict:
    """Every figure of a classifier on its test rows, as plain data.

    `groups` names each row's document; without it rows are independent. `nll` is in nats.
    Returns rows, documents, seeds, accuracy, nll, macro_f1, per_class (label, support, precision,
    recall, f1), confusion_matrix (rows = truth, summed over seeds) and per_seed. A class that is
    never predicted has precision and F1 0, as in scikit-learn's `zero_division=0`; macro F1 is over
    the classes that occur among the labels or predictions.
    """
    predictions, nll = np.atleast_2d(predictions), np.atleast_2d(nll)
    matrices = [confusion_matrix(labels, row, num_labels) for row in predictions]
    counts, draws = _counts_and_draws(labels, predictions, num_labels, groups, resamples)
    num_documents = _num_documents(groups, len(labels))

    def by_label(figure: Callable[[Counts], Figure], trials: Figure) -> list[Interval]:
        ours, drawn = figure(counts), figure(draws)
        return [
            _resampled_interval(ours[:, k], drawn[..., k], num_documents, float(trials[k]))
            for k in range(num_labels)
        ]

    support, predicted = counts["support"][0], counts["predicted"].mean(axis=0)
    precision, recall = by_label(_precision, predicted), by_label(_recall, support)
    f1, macro_f1 = by_label(_f1, support), _macro_f1(counts)
    return {
        "rows": len(labels),
        "documents": num_documents,
        "seeds": len(predictions),
        "accuracy": accuracy_interval(predictions == labels, groups),
        "nll": mean_interval(nll, groups),
        "macro_f1": _resampled_interval(
            macro_f1, _macro_f1(draws), num_documents, float(len(labels))
        ),
        "per_class": [
            {
                "label": label,
                "support": int(support[label]),
                "precision": precision[label],
                "recall": recall[label],
                "f1": f1[label],
            }
            for label in range(num_labels)
        ],
        "confusion_matrix": np.sum(matrices, axis=0).tolist(),
        "per_seed": [
            {
                "accuracy": float((predicted_labels == labels).mean()),
                "nll": float(seed_nll.mean()),
                "macro_f1": float(seed_f1),
                "confusion_matrix": matrix.tolist(),
            }
            for predicted_labels, seed_nll, seed_f1, matrix in zip(
                predictions, nll, macro_f1, matrices, strict=True
            )
        ],
    }


def completion_metrics(
    correct: Shaped[np.ndarray, "*seeds items"],
    nll: Float[np.ndarray, "*seeds items"],
    num_tokens: Int[np.ndarray, " items"] | None = None,
    groups: Groups = None,
) -> dict:
    """Every figure of a causal model on its test rows, as plain data.

    `correct` is 1 where the completion was matched exactly, `nll` is the mean over the row's target
    tokens in nats. With `num_tokens` (target tokens a row), perplexity, the exponential of the mean
    over *tokens*, comes too.
    """
    correct, nll = np.atleast_2d(correct), np.atleast_2d(nll)
    metrics: dict = {
        "rows": nll.shape[1],
        "documents": _num_documents(groups, nll.shape[1]),
        "seeds": len(nll),
        "accuracy": accuracy_interval(correct, groups),
        "nll": mean_interval(nll, groups),
        "per_seed": [
            {"accuracy": float(seed_correct.mean()), "nll": float(seed_nll.mean())}
            for seed_correct, seed_nll in zip(correct, nll, strict=True)
        ],
    }
    if num_tokens is not None:
        # A ratio of sums: its error is that of its linearisation around the ratio.
        mean_nll = float((nll * num_tokens).sum() / (num_tokens.sum() * len(nll)))
        influence = (nll - mean_nll) * num_tokens / num_tokens.mean()
        low, high = mean_over_seeds(influence, groups).interval()
        ends = np.exp([mean_nll, mean_nll + low, mean_nll + high])
        metrics["perplexity"] = _interval(*map(float, ends))
    return metrics


def accuracy_interval(
    correct: Shaped[np.ndarray, "seeds items"], groups: Groups = None
) -> Interval:
    """Share of correct rows. One run on independent rows: Wilson; else Wilson's shape with the
    error over seeds and documents."""
    if groups is None and len(correct) == 1:
        low, high = wilson(int(correct.sum()), correct.size)
        return Interval(mean=float(correct.mean()), low=low, high=high)
    estimate = mean_over_seeds(correct, groups)
    return _bounded_interval(
        estimate.value,
        estimate.standard_error**2,
        estimate.degrees_of_freedom,
        float(_num_documents(groups, correct.shape[1])),
    )


def mean_interval(values: Float[np.ndarray, "seeds items"], groups: Groups = None) -> Interval:
    """Mean over seeds and rows of an unbounded figure, with its t interval."""
    estimate = mean_over_seeds(values, groups)
    return _interval(estimate.value, *estimate.interval())


def _interval(mean: float, low: float, high: float) -> Interval:
    bounded = np.isfinite(low) and np.isfinite(high)
    return Interval(mean=mean, low=low if bounded else None, high=high if bounded else None)


def _num_documents(groups: Groups, num_items: int) -> int:
    return num_items if groups is None else len(np.unique(groups))


def _counts_and_draws(
    labels: Int[np.ndarray, " items"],
    predictions: Int[np.ndarray, "seeds items"],
    num_labels: int,
    groups: Groups,
    resamples: int,
) -> tuple[Counts, Counts]:
    """The counts of the sample (seeds, labels) and of bootstrap samples (draws, seeds, labels).

    Whole documents are drawn, the same for all seeds. Independent rows are drawn by their pattern
    (label and predictions): there are few patterns, so that a draw costs little.
    """
    one_hot = np.eye(num_labels)
    is_label = np.broadcast_to(one_hot[labels], (*predictions.shape, num_labels))
    is_predicted = one_hot[predictions]
    per_row = np.stack([is_label, is_predicted, is_label * is_predicted])  # kind, seed, row, label
    flat = per_row.transpose(2, 0, 1, 3).reshape(len(labels), -1)
    if groups is None:
        patterns = np.column_stack([labels, predictions.T])
        _, first, inverse = np.unique(patterns, axis=0, return_index=True, return_inverse=True)
        units, times = flat[first], np.bincount(inverse.ravel())
    else:
        _, document = np.unique(groups, return_inverse=True)
        units = np.zeros((document.max() + 1, flat.shape[1]))
        np.add.at(units, document, flat)
        times = np.ones(len(units), dtype=int)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    weights = generator.multinomial(times.sum(), times / times.sum(), size=resamples)
    drawn = (weights @ units).reshape(resamples, 3, len(predictions), num_labels)
    whole = (times @ units).reshape(3, len(predictions), num_labels)
    return _as_counts(whole), _as_counts(drawn.swapaxes(0, 1))


def _as_counts(kinds: Float[np.ndarray, "3 *draws seeds labels"]) -> Counts:
    return Counts(support=kinds[0], predicted=kinds[1], right=kinds[2])


def _ratio(above: Figure, below: Figure) -> Figure:
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def _precision(counts: Counts) -> Figure:
    return _ratio(counts["right"], counts["predicted"])


def _recall(counts: Counts) -> Figure:
    return _ratio(counts["right"], counts["support"])


def _f1(counts: Counts) -> Figure:
    return _ratio(2 * counts["right"], counts["support"] + counts["predicted"])


def _macro_f1(counts: Counts) -> Figure:
    occurs = counts["support"] + counts["predicted"] > 0
    return _f1(counts).sum(axis=-1) / occurs.sum(axis=-1)


def _resampled_interval(
    by_seed: Float[np.ndarray, " seeds"],
    drawn: Float[np.ndarray, "draws seeds"],
    num_documents: int,
    trials: float,
) -> Interval:
    """Rows' variance from the bootstrap, seeds' variance from the seeds, as in `Estimate`."""
    num_seeds = len(by_seed)
    rows = float(drawn.mean(axis=1).var(ddof=1))
    seeds = float(by_seed.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    total = rows + seeds
    parts = rows**2 / max(num_documents - 1, 1) + (seeds**2 / (num_seeds - 1) if seeds else 0.0)
    df = total**2 / parts if parts > 0 else float(max(num_documents - 1, 1))
    return _bounded_interval(float(by_seed.mean()), total, df, trials)


def _bounded_interval(share: float, variance: float, df: float, trials: float) -> Interval:
    """Wilson's interval with as many trials as would give this variance.

    It stays in [0, 1] and keeps its width where the share is 0 or 1; there the variance says
    nothing, and `trials` independent ones are assumed.
    """
    spread = share * (1 - share)
    if trials <= 0 or not np.isfinite(variance):  # no such class, or one document: nothing is known
        return Interval(mean=share, low=0.0, high=1.0)
    effective = spread / variance if spread > 0 and variance > 0 else trials
    critical = float(stats.t.ppf((1 + CONFIDENCE) / 2, df))
    low, high = wilson(share * effective, effective, critical)
    return Interval(mean=share, low=min(low, share), high=max(high, share))
