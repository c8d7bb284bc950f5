"""What an adapter costs its base, and what a weaker form of it would: points -> a dial, a choice.

Forgetting is lost log-likelihood of text that has nothing to do with the task, by the base without
and with the adapter. Two dials turn an adapter down after training: a scale on every delta, and a
cap on singular values in multiples of the size from which a direction becomes an intruder
(Shuttleworth et al. 2024, 2410.21228; `loralab.lowrank.intruder_onset`). Each dial is tested from
its weakest point up at half of the 5 % error, so that both together keep it
(`loralab.evidence.losing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loralab.evidence.losing import (
    CONFIDENCE,
    Groups,
    RowScores,
    holds,
    last_holding,
    loss_of,
    lost_rights,
)

Dial = Literal["scale", "cap"]
DIALS: tuple[Dial, ...] = ("scale", "cap")
SHARED = 1 - (1 - CONFIDENCE) / len(DIALS)


@dataclass(frozen=True)
class DialPoint:
    """A weakened adapter: `value` of which dial, its scores on task rows and on text to keep."""

    dial: Dial
    value: float
    task: RowScores
    keep: RowScores


def forgetting_curve(
    base_task: RowScores,
    base_keep: RowScores,
    settings: Sequence[DialPoint],
    budget: float,
    *,
    task_groups: Groups = None,
    keep_groups: Groups = None,
) -> list[dict[str, Any]]:
    """One row a setting: gain on the task, forgetting, whether that is within the budget, `chosen`.

    base_task, base_keep: of the base without any delta. The settings of each dial must come from
    the weakest to the strongest; among those that hold before the first that does not, the one of
    the largest gain is chosen.
    """
    rows = [
        {
            "dial": setting.dial,
            "value": setting.value,
            **gain_and_loss(base_task, base_keep, setting, task_groups, keep_groups),
            "chosen": False,
        }
        for setting in settings
    ]
    for row in rows:
        row["holds"] = holds(row["forgotten"], budget)
    allowed = []
    for dial in DIALS:
        own = [row for row in rows if row["dial"] == dial]
        allowed += own[: last_holding([row["holds"] for row in own])]
    best = max(allowed, key=_gain, default=None)
    if best is not None:
        best["chosen"] = True
    return rows


def gain_and_loss(
    base_task: RowScores,
    base_keep: RowScores,
    setting: DialPoint,
    task_groups: Groups = None,
    keep_groups: Groups = None,
) -> dict[str, Any]:
    """A setting's figures: log-likelihood gained on the task, and forgotten of the text."""
    return {
        "task": setting.task.figures(),
        "keep_nll": setting.keep.figures()["nll"],
        "gain": loss_of(setting.task.nll, base_task.nll, task_groups),
        "gained_accuracy": lost_rights(base_task.correct, setting.task.correct, task_groups),
        "forgotten": loss_of(base_keep.nll, setting.keep.nll, keep_groups, confidence=SHARED),
    }


def _gain(row: Mapping[str, Any]) -> float:
    mean = row["gain"]["mean"]
    return float("-inf") if mean is None else mean


def forgetting_verdict(document: Mapping[str, Any]) -> str:
    """What the adapter costs and which setting to take (keys as in docs/forgetting.md)."""
    whole = next(p for p in document["points"] if (p["dial"], p["value"]) == ("scale", 1.0))
    lost, gain = whole["forgotten"], whole["gain"]
    unit = document["unit"]
    told = (
        f"As trained the adapter gains {_interval(gain)} {unit} on its task and"
        f" {_change(lost)} nats a token of {document['keep']}"
    )
    chosen, budget = document["chosen"], f"{document['budget']:g}"
    if chosen is None:
        return f"{told}. No weaker setting is shown to forget less than {budget}."
    if (chosen["dial"], chosen["value"]) == ("scale", 1.0):
        return f"{told}: within the budget of {budget}, so it stays as it is."
    name = (
        f"Scaled by {chosen['value']:g}"
        if chosen["dial"] == "scale"
        else f"Capped at {chosen['value']:g} times the intruders' onset"
    )
    fresh = chosen["confirm"]
    upper = chosen["forgotten"]["upper"]
    bound = f"wins at least {_number(-upper)}" if upper < 0 else f"forgets at most {_number(upper)}"
    return (
        f"{told}. {name} it {bound} (budget {budget}); on fresh rows it"
        f" {_change(fresh['forgotten'])} and gains {_interval(fresh['gain'])}."
    )


def _change(forgotten: Mapping[str, float | None]) -> str:
    """What is forgotten, or won where that is below zero: the text is nearer to the task's."""
    mean, low, high = forgotten["mean"], forgotten["low"], forgotten["high"]
    if mean is None or low is None or high is None or mean >= 0:
        return f"forgets {_interval(forgotten)}"
    return f"wins {_interval({'mean': -mean, 'low': -high, 'high': -low})}"


def _interval(found: Mapping[str, float | None]) -> str:
    if found["mean"] is None or found["low"] is None or found["high"] is None:
        return "an amount that is not finite,"
    return f"{_number(found['mean'])} ({_number(found['low'])} to {_number(found['high'])})"


def _number(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")
