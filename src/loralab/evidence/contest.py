"""Who beats whom: every pair of methods on accuracy and on log-likelihood, and the winner if any.

Arrays in, decisions out: the comparison and the calibration of its error rates both use this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Shaped
from scipy import optimize

from loralab.measuring import POWER, PairedDifference, holm, paired_difference

ALPHA = 0.05

Measure = Literal["accuracy", "nll"]
Scores = Shaped[np.ndarray, "seeds items"]


@dataclass(frozen=True)
class Pair:
    """Two methods on one measure: `difference` is a minus b, `p` is Holm-corrected over pairs."""

    a: str
    b: str
    difference: PairedDifference
    p: float
    better: str | None  # the method that is significantly better, if any
    detectable_difference: float  # found in 80 % of repeats, at Holm's first step


@dataclass(frozen=True)
class Contest:
    """All pairs on both measures, and which measure decides."""

    methods: tuple[str, ...]
    primary: Measure
    accuracy: tuple[Pair, ...]
    nll: tuple[Pair, ...]

    @property
    def primary_pairs(self) -> tuple[Pair, ...]:
        return self.accuracy if self.primary == "accuracy" else self.nll

    @property
    def secondary_pairs(self) -> tuple[Pair, ...]:
        return self.nll if self.primary == "accuracy" else self.accuracy

    def beats(self, one: str, other: str) -> bool:
        """`one` is significantly better on the primary measure and not worse on the other one."""
        return (
            find_pair(self.primary_pairs, one, other).better == one
            and find_pair(self.secondary_pairs, one, other).better != other
        )

    @property
    def winner(self) -> str | None:
        """The method that beats every other."""
        for one in self.methods:
            others = [method for method in self.methods if method != one]
            if others and all(self.beats(one, other) for other in others):
                return one
        return None

    def detectable_lead(self, method: str, others: Sequence[str] | None = None) -> float:
        """The lead over all of `others` that would show over each of them in 80 % of repeats.

        Without `others`: over every other method, which makes `method` the winner. All pairs must
        show, the last of them at the level that Holm's steps have reached by then; their risks of
        not showing are added up.
        """
        rivals = [other for other in others or self.methods if other != method]
        own = [find_pair(self.primary_pairs, method, rival).difference for rival in rivals]
        alpha, risk = ALPHA / (len(self.primary_pairs) - len(own) + 1), 1 - POWER
        smallest = min(pair.detectable(alpha, 1 - risk) for pair in own)
        largest = max(pair.detectable(alpha, 1 - risk / len(own)) for pair in own)
        if smallest == largest:
            return largest

        def excess_risk(lead: float) -> float:
            return sum(1 - pair.power(lead, alpha) for pair in own) - risk

        root = optimize.root_scalar(excess_risk, bracket=(smallest, largest * (1 + 1e-9)))
        return float(root.root)


def find_pair(pairs: Sequence[Pair], one: str, other: str) -> Pair:
    """The pair of these two methods, in whichever order it was tested."""
    return next(pair for pair in pairs if {pair.a, pair.b} == {one, other})


def hold_contest(
    correct: Mapping[str, Scores],
    nll: Mapping[str, Scores],
    groups: Shaped[np.ndarray, " items"] | None = None,
    primary: Measure = "accuracy",
) -> Contest:
    """Tests every pair of methods on `correct` (0/1) and `nll` (nats), each (seeds, items).

    `primary` is chosen before the results are seen: it alone can make a winner, so that the chance
    of a false one stays at 5 %; the other measure can only take the win away.
    """
    return Contest(
        methods=tuple(correct),
        primary=primary,
        accuracy=_test_pairs(correct, groups, higher_is_better=True),
        nll=_test_pairs(nll, groups, higher_is_better=False),
    )


def _test_pairs(
    scores: Mapping[str, Scores],
    groups: Shaped[np.ndarray, " items"] | None,
    *,
    higher_is_better: bool,
) -> tuple[Pair, ...]:
    couples = list(combinations(scores, 2))
    differences = [paired_difference(scores[a], scores[b], groups) for a, b in couples]
    corrected = holm([difference.p for difference in differences])
    pairs = []
    for (a, b), difference, p in zip(couples, differences, corrected, strict=True):
        ahead = a if (difference.value > 0) == higher_is_better else b
        better = ahead if p < ALPHA else None
        pairs.append(Pair(a, b, difference, p, better, difference.detectable(ALPHA / len(couples))))
    return tuple(pairs)
