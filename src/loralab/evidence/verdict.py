"""The verdict: one sentence that claims what the contest showed, and no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.evidence.contest import Contest, find_pair


@dataclass(frozen=True)
class Standing:
    """What a verdict speaks of. `open_ends`: why a method might yet do better, by method."""

    contest: Contest
    winner: str | None
    open_ends: Mapping[str, str]
    accuracy: Mapping[str, float]
    nll: Mapping[str, float]
    num_rows: int
    num_documents: int
    num_seeds: Sequence[int]
    steps: Sequence[int]
    constant: Sequence[str]  # methods that give every row the same label


def write_verdict(standing: Standing) -> str:
    """One sentence with rows, documents, seeds, steps, the difference and its interval."""
    contest = standing.contest
    reasons = _listed(list(standing.open_ends.values()))
    if not contest.primary_pairs:
        return f"No winner: {reasons}{_remains(standing)}."
    ahead, *others = _ranking(standing)
    if standing.winner:
        clauses = f"{_lead(standing, ahead, others[0])}{_how_sure(standing)}"
        clauses += _agreement(standing)
        return f"{ahead} wins: {_setting(standing)}, {clauses}{_constant(standing)}."
    # Against the best of those it did not beat: that is where the win was lost.
    unbeaten = [other for other in others if not contest.beats(ahead, other)] or others
    shown = f"{_setting(standing)}, {_lead(standing, ahead, unbeaten[0])}"
    if standing.open_ends:
        shown = f"No winner, because {reasons}; {shown}"
        return f"{shown}{_smallest(standing, ahead, unbeaten)}{_constant(standing)}."
    beaten = [other for other in others if other not in unbeaten]
    return f"No winner: {shown}{_why_not(standing, ahead, unbeaten, beaten)}{_constant(standing)}."


def _ranking(standing: Standing) -> list[str]:
    """Best first on the deciding measure; equals in the order they were given."""
    if standing.contest.primary == "accuracy":
        return sorted(standing.accuracy, key=lambda method: -standing.accuracy[method])
    return sorted(standing.nll, key=lambda method: standing.nll[method])


def _setting(standing: Standing) -> str:
    rows = f"{standing.num_rows:,} test rows"
    if standing.num_documents < standing.num_rows:
        rows += f" ({standing.num_documents:,} documents)"
    seeds, steps = _range(standing.num_seeds), _range(standing.steps)
    return f"on {rows}, with {seeds} seeds of {steps} steps a method"


def _lead(standing: Standing, ahead: str, behind: str) -> str:
    pair = find_pair(standing.contest.primary_pairs, ahead, behind)
    sign = 1 if (pair.a == ahead) == (standing.contest.primary == "accuracy") else -1
    low, high = sorted((sign * pair.difference.low, sign * pair.difference.high))
    interval = f"95 % interval {_number(standing, low)} to {_number(standing, high)}"
    if pair.difference.value == 0:
        return f"{ahead} and {behind} are level in {_measure(standing)} ({interval})"
    verb = "is" if standing.winner else "was"
    size = _size(standing, pair.difference.value)
    return f"{ahead} {verb} {size} ahead of {behind} in {_measure(standing)} ({interval})"


def _how_sure(standing: Standing) -> str:
    own = [p.p for p in standing.contest.primary_pairs if standing.winner in (p.a, p.b)]
    if len(own) == 1:
        return f" (p = {own[0]:.2g})"
    return f", the next best, and better than every other (Holm-corrected p at most {max(own):.2g})"


def _agreement(standing: Standing) -> str:
    """Against whom the winner is better on the other measure too."""
    agreed = [
        pair.b if pair.a == standing.winner else pair.a
        for pair in standing.contest.secondary_pairs
        if pair.better == standing.winner
    ]
    return f"; {_other_measure(standing)} agrees against {_listed(agreed)}" if agreed else ""


def _why_not(standing: Standing, ahead: str, unbeaten: Sequence[str], beaten: Sequence[str]) -> str:
    contest = standing.contest
    in_doubt = [m for m in unbeaten if find_pair(contest.primary_pairs, ahead, m).better != ahead]
    if not in_doubt:  # the other measure took the win away
        return f", but significantly worse than {_listed(unbeaten)} in {_other_measure(standing)}"
    told = f", though {ahead} does beat {_listed(beaten)}" if beaten else ""
    best = [m for m in contest.methods if _leads_on_the_other_measure(contest, m)]
    other = f"; in {_other_measure(standing)} {best[0]} is better than every other" if best else ""
    return f", too little to tell them apart{told}{_smallest(standing, ahead, in_doubt)}{other}"


def _leads_on_the_other_measure(contest: Contest, method: str) -> bool:
    return all(
        pair.better == method for pair in contest.secondary_pairs if method in (pair.a, pair.b)
    )


def _smallest(standing: Standing, ahead: str, rivals: Sequence[str]) -> str:
    """The lead that would have told the leader apart from its rivals."""
    over = f" over {_listed(rivals)}" if len(rivals) < len(standing.contest.methods) - 1 else ""
    size = _size(standing, standing.contest.detectable_lead(ahead, rivals))
    return f"; the smallest lead{over} that would have shown in 80 % of repeats is {size}"


def _constant(standing: Standing) -> str:
    if not standing.constant:
        return ""
    verb = "gives" if len(standing.constant) == 1 else "give"
    return f"; {_listed(list(standing.constant))} {verb} every row the same label"


def _remains(standing: Standing) -> str:
    left = list(standing.accuracy)
    return f", which leaves only {left[0]} with figures" if left else ", which leaves no figures"


def _measure(standing: Standing) -> str:
    return "accuracy" if standing.contest.primary == "accuracy" else "log-likelihood"


def _other_measure(standing: Standing) -> str:
    return "log-likelihood" if standing.contest.primary == "accuracy" else "exact matches"


def _size(standing: Standing, difference: float) -> str:
    unit = "points" if standing.contest.primary == "accuracy" else "nats a row"
    return f"{_number(standing, abs(difference))} {unit}"


def _number(standing: Standing, value: float) -> str:
    if standing.contest.primary == "accuracy":
        return f"{100 * value:.1f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _range(counts: Sequence[int]) -> str:
    low, high = counts[0], counts[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _listed(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
