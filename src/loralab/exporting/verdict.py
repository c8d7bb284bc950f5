"""What a server's answers say of the adapter: applied, not applied, at another scale, or else.

The answers are one vector of log-likelihoods. The adapter at growing scales is a curve from the
base's vector through the adapter's own; the nearest point on it says at which scale the server
applies the adapter, and the distance from it whether that explains the answers at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Outcome = Literal["applied", "not applied", "wrong scale", "something else", "undecided"]
Vector = Float[np.ndarray, "answers"]

TOLERANCE_NATS = 0.05  # rounding of a 16-bit server, root mean square of an answer
UNEXPLAINED = 0.35  # of the effect: more than that off the curve is something else
FACTOR_TOLERANCE = 0.2  # of the scale, within which it is the right one
NOTHING = 0.1  # of the scale, up to which nothing was applied
UNCERTAIN = 0.15  # of the scale: a larger standard error decides nothing
LEAST_ANSWERS = 6  # fewer can be explained by more than one scale
OTHER_BASE_NATS = 1.0  # a token: a base this far from the exported one is another model


@dataclass(frozen=True)
class Verdict:
    """What the answers show.

    factor: the scale at which the adapter is applied (1 is right); None where no scale explains
        the answers. factor_error: its standard error.
    effect_nats, residual_nats: root mean squares of an answer: what the adapter should change, and
        how far the answers are from the best explanation.
    base_nats: how far the server's own base is from the exported one, where it could be asked.
    """

    outcome: Outcome
    explanation: str
    factor: float | None
    factor_error: float | None
    effect_nats: float
    residual_nats: float
    base_nats: float | None = None


def judge(
    found: Vector,
    expected: Mapping[str, Vector],
    scales: Mapping[str, float | int],
    *,
    base: Vector | None = None,
    original: Mapping[str, Any] | None = None,
    tolerance_nats: float = TOLERANCE_NATS,
) -> Verdict:
    """The verdict on a server's answers.

    expected: variant -> the answers it would give, "base" and "adapter" among them; scales: those
        variants that are the adapter at some factor. base: what the same server says without the
        adapter, which cancels the error of a quantised base. original: rank, alpha and scaling of
        the adapter as trained, so that a wrong factor's cause can be named.
    """
    base_nats = None if base is None else _rms(base - expected["base"])
    corrected = found
    if base is not None and base_nats is not None and base_nats > tolerance_nats:
        corrected = found - base + expected["base"]
    fit = _fit(corrected, expected, scales)

    def verdict(outcome: Outcome, why: str) -> Verdict:
        scaled = outcome != "something else" and fit.effect > 0
        return Verdict(
            outcome,
            why,
            factor=fit.factor if scaled else None,
            factor_error=fit.error if scaled else None,
            effect_nats=fit.effect,
            residual_nats=fit.residual,
            base_nats=base_nats,
        )

    if fit.effect == 0:
        return verdict("undecided", "the adapter changes nothing on these probes")
    if len(found) < LEAST_ANSWERS:
        return verdict("undecided", f"the server gave {len(found)} answers, which is too few")
    if base is not None and _rms(found - base) < NOTHING * fit.effect:
        return verdict("not applied", "the answers are those of the server's own base")
    if base_nats is not None and base_nats > OTHER_BASE_NATS:
        why = f"the server's base is another model than the exported one ({base_nats:.2g} nats off)"
        return verdict("something else", why)
    if fit.is_part(tolerance_nats):
        why = f"the adapter is applied in part: the answers are those {fit.part}"
        return verdict("something else", why)
    if fit.residual > fit.explained(tolerance_nats):
        why = (
            f"no scale of this adapter on this base explains the answers ({fit.residual:.2g} nats"
            f" off; its effect is {fit.effect:.2g}): another base, another adapter, or a part of it"
        )
        return verdict("something else", why)
    if fit.error > UNCERTAIN:
        why = (
            f"the server's noise ({fit.residual:.2g} nats an answer) is too near to the adapter's"
            f" effect ({fit.effect:.2g})"
        )
        return verdict("undecided", why)
    if fit.factor <= NOTHING:
        return verdict("not applied", "the answers are the base's")
    if abs(fit.factor - 1) <= FACTOR_TOLERANCE:
        return verdict("applied", f"at {fit.factor:.2f} times its scale")
    cause = _cause(fit.factor, original)
    return verdict("wrong scale", f"at {fit.factor:.3g} times its scale{cause}")


@dataclass(frozen=True)
class _Fit:
    """The nearest point of the curve, and the nearest variant that is a part of the adapter.

    error: of the factor, if what the curve leaves unexplained is noise.
    """

    factor: float
    residual: float
    effect: float
    error: float
    part: str
    part_residual: float

    def explained(self, tolerance_nats: float) -> float:
        """Up to which distance a variant explains the answers."""
        return max(UNEXPLAINED * self.effect, tolerance_nats)

    def is_part(self, tolerance_nats: float) -> bool:
        """Whether a part of the adapter explains what no scale of the whole does as well."""
        nearer = self.part_residual < 0.5 * self.residual
        visible = self.residual > NOTHING * self.effect
        return nearer and visible and self.part_residual <= self.explained(tolerance_nats)


def _fit(found: Vector, expected: Mapping[str, Vector], scales: Mapping[str, float | int]) -> _Fit:
    curve = sorted(((float(f), expected[name]) for name, f in scales.items()), key=_first)
    factor, residual = _nearest_on(curve, found)
    parts = {n: _rms(found - v) for n, v in expected.items() if n not in scales and n != "base"}
    part = min(parts, key=lambda name: parts[name], default="")
    effect = _rms(expected["adapter"] - curve[0][1])
    error = residual / (effect * math.sqrt(max(1, len(found)))) if effect else math.inf
    return _Fit(factor, residual, effect, error, part, parts.get(part, math.inf))


def _first(pair: tuple[float, Vector]) -> float:
    return pair[0]


def _nearest_on(curve: list[tuple[float, Vector]], found: Vector) -> tuple[float, float]:
    """(factor, distance) of the nearest point on the lines between neighbours of the curve."""
    best = (curve[0][0], _rms(found - curve[0][1]))
    for (low, start), (high, stop) in pairwise(curve):
        step = stop - start
        length = float(step @ step)
        share = 0.0 if length == 0 else float(np.clip((found - start) @ step / length, 0.0, 1.0))
        distance = _rms(found - start - share * step)
        if distance < best[1]:
            best = (low + share * (high - low), distance)
    return best


def _cause(factor: float, original: Mapping[str, Any] | None) -> str:
    """What a mistaken engine would do to this adapter to arrive at that factor."""
    if not original:
        return ""
    rank, alpha = float(original["rank"]), float(original["alpha"])
    root = original["scaling"] == "alpha/sqrt(rank)"
    scale = alpha / math.sqrt(rank) if root else alpha / rank
    causes = {1 / scale: "the scale is left out", scale: "the scale is applied twice"}
    if root:
        causes[1 / math.sqrt(rank)] = "rsLoRA is read as alpha / rank"
    else:
        causes[math.sqrt(rank)] = "alpha / rank is read as rsLoRA"
    for expected, cause in causes.items():
        if expected != 1 and abs(factor / expected - 1) < 0.1:
            return f", as if {cause}"
    return ""


def judge_texts(found: list[str], expected: list[Mapping[str, str]]) -> Verdict:
    """The verdict on greedy continuations alone, where a server tells no log-likelihoods."""
    told = [
        (text, row)
        for text, row in zip(found, expected, strict=True)
        if row["base"] != row["adapter"]
    ]
    adapted = sum(_same(text, row["adapter"]) for text, row in told)
    plain = sum(_same(text, row["base"]) for text, row in told)

    def verdict(outcome: Outcome, why: str) -> Verdict:
        return Verdict(outcome, why, None, None, 0.0, 0.0)

    counted = f"of {len(told)} continuations, {adapted} are the adapter's, {plain} the base's"
    if not told:
        return verdict("undecided", "base and adapter continue every probe alike")
    if adapted > 0.6 * len(told):
        return verdict("applied", f"{counted}; texts cannot tell its scale")
    if plain > 0.6 * len(told):
        return verdict("not applied", counted)
    return verdict("something else", counted)


def _same(text: str, expected: str) -> bool:
    return text.strip()[: len(expected.strip())] == expected.strip()


def _rms(vector: Vector) -> float:
    return float(np.sqrt(np.mean(np.square(vector)))) if len(vector) else 0.0
