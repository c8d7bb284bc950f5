"""What a smaller or weaker adapter loses, row by row, and which of a sequence still holds.

A sequence of candidates is tested in an order that is fixed before any row is looked at, the
safest first, each at the full level, until one fails: the chance that any candidate passes whose
true loss is above the tolerance is then at most 5 %, without a correction for their number
(fixed-sequence procedure; Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen 2001).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy import special

from loralab.measuring import Estimate, mean_over_seeds

CONFIDENCE = 0.95
BOUNDS = ("mean", "low", "high", "upper")
Rows = Float[np.ndarray, " rows"]
Groups = Shaped[np.ndarray, " rows"] | None


@dataclass(frozen=True)
class RowScores:
    """What a model said of each row: nats lost a target (-log p), and the share it got right."""

    nll: Rows
    correct: Rows

    def figures(self) -> dict[str, float]:
        """Means over the rows."""
        return {"nll": float(self.nll.mean()), "accuracy": float(self.correct.mean())}


def loss_of(
    reference: Rows, candidate: Rows, groups: Groups = None, *, confidence: float = CONFIDENCE
) -> dict[str, float | None]:
    """How much more `candidate` scores than `reference`, paired by row.

    Returns mean, the 95 % interval low to high, and `upper`, the one-sided bound of `confidence`
    (a caller that tests two sequences gives each half of the error). t intervals
    with the documents in `groups` as clusters (CR2, `docs/statistics.md`). Rows whose score is not
    finite make the mean and all bounds None: nothing can be said of such a candidate. Where all
    rows are equal every bound is 0: the same outputs lose nothing.
    """
    difference = candidate - reference
    if not np.isfinite(difference).all():
        return dict.fromkeys(BOUNDS)
    if not difference.any():  # else zeros would be smoothed as rights and wrongs are
        return dict.fromkeys(BOUNDS, 0.0)
    return _bounds(mean_over_seeds(difference[None, :], groups), confidence)


def lost_rights(reference: Rows, candidate: Rows, groups: Groups = None) -> dict[str, float | None]:
    """`loss_of` for shares of right answers: how many more of them `candidate` has.

    Where a row is right or wrong, half a discordant row more is counted each way. Without that
    (Agresti and Min 2005) a handful of such rows, or none, would look too certain.
    """
    difference = candidate - reference
    found = mean_over_seeds(difference[None, :], groups)
    if np.isin(difference, (-1.0, 0.0, 1.0)).all():
        num_rows = len(difference)
        clusters = num_rows if groups is None else len(np.unique(groups))
        error = float(np.hypot(found.standard_error, 1 / num_rows))
        df = found.degrees_of_freedom if found.standard_error > 0 else max(1.0, clusters - 1.0)
        found = Estimate(found.value, error, df, found.expected_error)
    return _bounds(found, CONFIDENCE)


def _bounds(estimate: Estimate, confidence: float) -> dict[str, float | None]:
    low, high = estimate.interval()
    reach = float(special.stdtrit(estimate.degrees_of_freedom, confidence))
    upper = estimate.value + reach * estimate.standard_error
    bounds = {"mean": estimate.value, "low": low, "high": high, "upper": upper}
    return {name: float(value) if np.isfinite(value) else None for name, value in bounds.items()}


def losses(reference: RowScores, candidate: RowScores, groups: Groups = None) -> dict[str, Any]:
    """A candidate's own figures, and what it loses: log-likelihood (nats) and accuracy."""
    return {
        **candidate.figures(),
        "lost_nll": loss_of(reference.nll, candidate.nll, groups),
        "lost_accuracy": lost_rights(candidate.correct, reference.correct, groups),
    }


def holds(lost: dict[str, float | None], tolerance: float) -> bool:
    """Whether the one-sided bound stays below the tolerance."""
    return lost["upper"] is not None and lost["upper"] < tolerance


def last_holding(passes: Sequence[bool]) -> int:
    """How many of the sequence hold before the first that does not."""
    return next((index for index, passed in enumerate(passes) if not passed), len(passes))
