"""Proof of application: what a served adapter answers, against its base and its stored probes.

An adapter is refused where it changes nothing, where its scale is another than it was trained with,
where only part of it is applied, and where the base is another. What the probes cannot tell apart
from rounding is "unproved", and says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loralab.adapters import Adapter, Probe
from loralab.errors import AdapterError
from loralab.serving.requests import Entry
from loralab.serving.store import Proof

MOST_PROBES = 4  # the shortest ones: a proof must not hold up a server
TOLERANCE = 0.1  # of the adapter's effect
ROUNDING_NATS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2, "int8": 0.2}
"""Of a probe's log-likelihood, times the root of its tokens."""
UNPROVED_NO_PROBES = "no probes"
SECANT_STEPS = 3
SAME_FACTOR = 0.02

Ask = Callable[[Sequence[Sequence[int]], Entry], list[float]]
"""Log-likelihoods in nats of inputs along a route, as `measuring.log_likelihoods` has them."""


@dataclass(frozen=True)
class Answers:
    """Log-likelihoods of the probes in nats: by the base, the served adapter, and as stored.

    rounding: what is noise, a probe.
    """

    base: Sequence[float]
    found: Sequence[float]
    expected: Sequence[float]
    rounding: Sequence[float]

    @property
    def moved(self) -> float:
        """How far the served adapter is from the base, at most."""
        return max(map(abs, _minus(self.found, self.base)))

    @property
    def effect(self) -> float:
        """How far the trained adapter was from the base, summed."""
        return sum(map(abs, _minus(self.expected, self.base)))

    @property
    def error(self) -> float:
        """How far the served adapter is from the trained one, summed."""
        return sum(map(abs, _minus(self.found, self.expected)))

    @property
    def noise(self) -> float:
        """What rounding alone may make of it, summed."""
        return sum(self.rounding)

    @property
    def agrees(self) -> bool:
        """Whether the served adapter is the trained one."""
        return self.error <= self.noise + TOLERANCE * self.effect

    @property
    def share(self) -> float:
        """The part of the trained adapter's effect that is there (least squares)."""
        trained = _minus(self.expected, self.base)
        moved = _minus(self.found, self.base)
        squares = sum(value * value for value in trained)
        return sum(map(math.prod, zip(trained, moved, strict=True))) / max(squares, 1e-30)


def prove(ask: Ask, hosted: str, adapter: Adapter, *, dtype: str) -> Proof:
    """Runs the adapter's probes; raises `AdapterError` that says what is wrong with it.

    dtype: in which the base is served, which decides what is rounding.
    """
    probes = sorted(adapter.probes, key=lambda probe: len(probe.input_ids))[:MOST_PROBES]
    answers = _ask_all(ask, hosted, probes, dtype)
    _refuse_no_effect(answers, adapter)
    if answers.agrees and answers.effect > 2 * answers.noise:
        return _proof(answers)
    if answers.agrees or answers.error <= 3 * answers.noise:
        return _proof(
            answers, f"its effect on the probes is below the rounding of a base in {dtype}"
        )
    raise _diagnosis(ask, hosted, adapter, probes, answers)


def measure_effect(ask: Ask, hosted: str, inputs: Sequence[Sequence[int]]) -> Proof:
    """For an adapter without probes: whether it changes what the base says to these inputs.

    Raises `AdapterError` where it does not.
    """
    base, found = ask(inputs, None), ask(inputs, hosted)
    moved = max(map(abs, _minus(found, base)))
    if moved <= _nothing(base):
        raise _no_effect(len(inputs), "prompts")
    return Proof("unproved", UNPROVED_NO_PROBES, effect_nats=moved)


def _ask_all(ask: Ask, hosted: str, probes: Sequence[Probe], dtype: str) -> Answers:
    inputs = [probe.input_ids for probe in probes]
    per_token = ROUNDING_NATS.get(dtype, ROUNDING_NATS["bfloat16"])
    return Answers(
        base=ask(inputs, None),
        found=ask(inputs, hosted),
        expected=[float(probe.log_likelihood) for probe in probes],
        rounding=[per_token * math.sqrt(len(ids)) for ids in inputs],
    )


def _proof(answers: Answers, unproved: str = "") -> Proof:
    return Proof(
        "unproved" if unproved else "proved",
        unproved,
        effect_nats=answers.moved,
        error_nats=max(map(abs, _minus(answers.found, answers.expected))),
    )


def _refuse_no_effect(answers: Answers, adapter: Adapter) -> None:
    if answers.moved > _nothing(answers.base):
        return
    if answers.effect <= answers.noise:
        raise _no_effect(len(answers.base), "probes")
    raise AdapterError(
        f"no effect: with the adapter the model answers its {len(answers.base)} probes as the base "
        f"does; trained, it moved them by {answers.effect / len(answers.base):.3g} nats each"
        + _silent_parts(adapter),
        "save the adapter again from where it was trained.",
    )


def _no_effect(count: int, what: str) -> AdapterError:
    return AdapterError(
        f"no effect: with the adapter the model answers {count} {what} exactly as the base does",
        "train it (a fresh adapter's B is zero), or leave it out: the base serves alone.",
    )


def _diagnosis(
    ask: Ask, hosted: str, adapter: Adapter, probes: Sequence[Probe], answers: Answers
) -> AdapterError:
    """Which fault it is: another scale explains the answers, a part of the effect does, nothing."""
    off = f"on {len(probes)} probes {answers.error / len(probes):.3g} nats a probe from training"
    factor = _fitting_factor(ask, hosted, adapter, probes, answers)
    if factor is not None:
        reason = factor[1] and f" ({factor[1]})"
        return AdapterError(
            f"wrong scale: the adapter is {off}; with {factor[0]:.4g} times its scale the answers "
            f"are the trained ones{reason}",
            "put lora_alpha, r and use_rslora right in adapter_config.json, as it was trained.",
        )
    silent = _silent_parts(adapter)
    if silent or 0.1 < answers.share < 0.9:
        return AdapterError(
            f"partly applied: the adapter is {off}, and about {answers.share:.0%} of its effect is "
            f"there{silent}",
            "save the adapter again from where it was trained; some of its tensors are missing.",
        )
    return AdapterError(
        f"wrong base: the adapter is {off}, and neither a scale nor a part of it explains that",
        "serve it on the base that it was trained on, with the same task and pooling.",
    )


def _fitting_factor(
    ask: Ask, hosted: str, adapter: Adapter, probes: Sequence[Probe], answers: Answers
) -> tuple[float, str] | None:
    """The factor of the scale at which the answers are the trained ones, and what explains it."""
    inputs = [probe.input_ids for probe in probes]
    likely = _likely_factors(adapter)
    tried = {1.0: answers}

    def try_out(factor: float) -> None:
        found = ask(inputs, {hosted: factor})
        tried[factor] = Answers(answers.base, found, answers.expected, answers.rounding)

    def nearest() -> float:
        return min(tried, key=lambda factor: tried[factor].error)

    try:
        for factor in likely:
            try_out(factor)
        for _ in range(SECANT_STEPS):  # the answers are nearly linear in a small scale
            share = tried[nearest()].share
            if not 1e-3 < abs(share) < 1e3:
                break
            try_out(nearest() / share)
    except AdapterError:  # a kind of adapter that has no part of an effect
        return None
    factor = nearest()
    if not tried[factor].agrees:
        return None
    named = min(likely, key=lambda other: abs(other / factor - 1))
    if abs(named / factor - 1) < SAME_FACTOR:
        return named, likely[named]
    return factor, ""


def _likely_factors(adapter: Adapter) -> Mapping[float, str]:
    """What scales are confused with: factors of the scale, and in words why."""
    factors: dict[float, str] = {}
    ranks = {A.shape[0] for A, _ in adapter.pairs.values()}
    for rank in sorted(ranks):
        root = math.sqrt(rank)
        factors.setdefault(root, f"sqrt of rank {rank}: it was trained with use_rslora")
        factors.setdefault(1 / root, f"1 / sqrt of rank {rank}: it was trained without use_rslora")
    for scale in sorted({adapter.scale(module) for module in adapter.pairs}):
        factors.setdefault(1 / scale, f"its scale is {scale:.4g}, which is in its factors already")
    for factor in (2.0, 0.5, 4.0, 0.25):
        factors.setdefault(factor, "")
    factors.pop(1.0, None)
    return factors


def _silent_parts(adapter: Adapter) -> str:
    """Modules whose pair adds nothing, in words; "" where none, or all, are so."""
    silent = [p for p, (A, B) in adapter.pairs.items() if not (A.any() and B.any())]
    if not silent or len(silent) == len(adapter.pairs):
        return ""
    kinds = sorted({path.rpartition(".")[2] for path in silent})
    return f"; {len(silent)} of {len(adapter.pairs)} pairs are zero ({', '.join(kinds[:8])})"


def _minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(first, second, strict=True)]


def _nothing(base: Sequence[float]) -> float:
    """Below this a difference between two runs of the same sums is none."""
    return 1e-6 * (1 + max(map(abs, base)))
