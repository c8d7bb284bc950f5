"""Which rank is enough: candidates' scores on rows -> the curve, the choice, its confirmation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loralab.evidence.losing import Groups, RowScores, holds, last_holding, losses

Rule = Literal["uniform", "global"]


@dataclass(frozen=True)
class Candidate:
    """A truncated adapter.

    rank: the same in every module ("uniform"), or that whose size it has ("global").
    ranks: by module. relative_error: of the deltas' norm. scores: on the rows for choosing.
    """

    rule: Rule
    rank: int
    ranks: Mapping[str, int]
    num_parameters: int
    num_bytes: int
    relative_error: float
    scores: RowScores

    def facts(self) -> dict[str, Any]:
        """What it is, without its scores."""
        return {
            "rule": self.rule,
            "rank": self.rank,
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "relative_error": self.relative_error,
        }


def rank_curve(
    reference: RowScores,
    candidates: Sequence[Candidate],
    tolerance: float,
    groups: Groups = None,
) -> list[dict[str, Any]]:
    """One row a candidate, in the order given: facts, figures, losses, `holds`, `chosen`.

    The candidates of each rule must come with falling rank: that is the order they are tested in
    (`loralab.evidence.losing`), and the last that holds before the first that does not is chosen.
    """
    rows = []
    for candidate in candidates:
        lost = losses(reference, candidate.scores, groups)
        rows.append(
            {**candidate.facts(), **lost, "holds": holds(lost["lost_nll"], tolerance)}
            | {"chosen": False}
        )
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        count = last_holding([row["holds"] for row in own])
        if count:
            own[count - 1]["chosen"] = True
    return rows


def chosen_index(curve: Sequence[Mapping[str, Any]], rule: Rule) -> int | None:
    """The position of a rule's choice; None where not even its largest candidate holds."""
    found = (i for i, row in enumerate(curve) if row["rule"] == rule and row["chosen"])
    return next(found, None)


def confirmation(
    reference: RowScores, chosen: RowScores, tolerance: float, groups: Groups = None
) -> dict[str, Any]:
    """What the choice loses on rows that had no part in choosing, and whether that is tolerable.

    `within`: the mean loss is at most the tolerance. `proven`: its one-sided bound is below it.
    """
    lost = losses(reference, chosen, groups)
    mean = lost["lost_nll"]["mean"]
    return {
        **lost,
        "rows": len(chosen.nll),
        "documents": len(chosen.nll) if groups is None else len(np.unique(groups)),
        "within": mean is not None and mean <= tolerance,
        "proven": holds(lost["lost_nll"], tolerance),
    }


def rank_verdict(document: Mapping[str, Any]) -> str:
    """The answer in words, with the figures it stands on (keys as in docs/rank.md)."""
    tolerance = f"{document['tolerance']:g}"
    unit = document["unit"]
    chosen, full = document["chosen"], document["full"]
    if chosen is None:
        largest = next(row for row in document["curve"] if row["rule"] == document["rule"])
        upper = largest["lost_nll"]["upper"]
        shown = "could not be bounded" if upper is None else f"may lose up to {_number(upper)}"
        return (
            f"No truncation is shown to be harmless: rank {largest['rank']} {shown} {unit} on"
            f" {document['rows']['choose']:,} rows, more than the tolerance of {tolerance}. Keep"
            f" rank {full['rank']}, or measure on more rows."
        )
    name = f"Rank {chosen['rank']}"
    if chosen["rule"] == "global":
        name = f"The size of rank {chosen['rank']}, spread by one threshold,"
    found = chosen["confirm"]
    doubt = "" if found["within"] else f", which is more than the tolerance: {_DOUBT}"
    return (
        f"{name} is enough: {_bounded(chosen['lost_nll']['upper'], unit)} on"
        f" {document['rows']['choose']:,} rows, within the tolerance of {tolerance};"
        f" on {found['rows']:,} fresh rows {_on_fresh(found['lost_nll'])}"
        f"{doubt}. {100 * chosen['bytes'] / full['bytes']:.0f} % of the bytes of rank"
        f" {full['rank']}."
    )


def _bounded(upper: float, unit: str) -> str:
    """The one-sided bound of a choice in words; below zero it bounds a gain."""
    if upper < 0:
        return f"it gains at least {_number(-upper)} {unit} (95 %)"
    return f"it loses at most {_number(upper)} {unit} (95 %)"


def _on_fresh(lost: Mapping[str, float | None]) -> str:
    mean, low, high = lost["mean"], lost["low"], lost["high"]
    if mean is None or low is None or high is None:
        return "its loss is not finite"
    if mean < 0:
        return f"it gains {_number(-mean)} ({_number(-high)} to {_number(-low)})"
    return f"it loses {_number(mean)} ({_number(low)} to {_number(high)})"


_DOUBT = "do not rely on it, and choose again on more rows"


def _number(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")
