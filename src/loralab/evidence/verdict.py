"""The verdict: one sentence that claims what the contest showed, and no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.evidence.contest import Contest, Pair, find_pair


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
    if not standing.contest.primary_pairs:
        return f"No winner: {_listed(list(standing.open_ends.values()))}{_remains(standing)}."
    ahead, behind = _leaders(standing)
    if standing.winner:
        pair = find_pair(standing.contest.primary_pairs, ahead, behind)
        return (
            f"{standing.winner} wins: {_setting(standing)}, {_lead(standing, pair, ahead, behind)}"
            f"{_second_place(standing, behind)}{_secondary(standing, ahead)}"
            f"{_constant(standing)}."
        )
    pair = find_pair(standing.contest.primary_pairs, ahead, behind)
    if standing.open_ends:
        reasons = _listed(list(standing.open_ends.values()))
        return (
            f"No winner, because {reasons}; {_setting(standing)},"
            f" {_lead(standing, pair, ahead, behind)}{_smallest(standing, ahead)}"
            f"{_constant(standing)}."
        )
    return (
        f"No winner: {_setting(standing)}, {_lead(standing, pair, ahead, behind)}"
        f"{_why_not(standing, ahead)}{_smallest(standing, ahead)}{_secondary(standing, None)}"
        f"{_constant(standing)}."
    )


def _leaders(standing: Standing) -> tuple[str, str]:
    """The two best on the deciding measure; equals in the order they were given."""
    if standing.contest.primary == "accuracy":
        order = sorted(standing.accuracy, key=lambda method: -standing.accuracy[method])
    else:
        order = sorted(standing.nll, key=lambda method: standing.nll[method])
    return order[0], order[1]


def _setting(standing: Standing) -> str:
    documents = (
        "each a document of its own"
        if standing.num_documents == standing.num_rows
        else f"{standing.num_documents:,} documents"
    )
    return (
        f"on {standing.num_rows:,} test rows ({documents}), with {_range(standing.num_seeds)} seeds"
        f" of {_range(standing.steps)} steps a method"
    )


def _lead(standing: Standing, pair: Pair, ahead: str, behind: str) -> str:
    difference = pair.difference
    sign = 1 if pair.a == ahead else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    size = _size(standing, sign * difference.value)
    interval = f"95 % interval {_number(standing, low)} to {_number(standing, high)}"
    if difference.value == 0:
        return f"{ahead} and {behind} are level in {_measure(standing)} ({interval})"
    verb = "is" if standing.winner else "was"
    side = "above" if standing.contest.primary == "accuracy" else "from"
    return f"{ahead} {verb} {size} {side} {behind} in {_measure(standing)} ({interval})"


def _second_place(standing: Standing, behind: str) -> str:
    if len(standing.contest.methods) == 2:
        pair = standing.contest.primary_pairs[0]
        return f" (p = {pair.p:.2g})"
    worst = max(
        pair.p for pair in standing.contest.primary_pairs if standing.winner in (pair.a, pair.b)
    )
    return f", the next best, and better than every other (Holm-corrected p at most {worst:.2g})"


def _why_not(standing: Standing, ahead: str) -> str:
    """Where the leader's lead is significant and yet no win."""
    pairs = standing.contest.secondary_pairs
    vetoes = [
        method
        for method in standing.contest.methods
        if method != ahead and find_pair(pairs, ahead, method).better == method
    ]
    significant = all(
        find_pair(standing.contest.primary_pairs, ahead, method).better == ahead
        for method in standing.contest.methods
        if method != ahead
    )
    if significant and vetoes:
        return f", but significantly worse than {_listed(vetoes)} in {_other_measure(standing)}"
    beaten = [
        method
        for method in standing.contest.methods
        if method != ahead and standing.contest.beats(ahead, method)
    ]
    told = f", though {ahead} does beat {_listed(beaten)}" if beaten else ""
    return f", too little to tell them apart{told}"


def _smallest(standing: Standing, ahead: str) -> str:
    """The lead that would have told the leader apart from those it did not beat."""
    contest = standing.contest
    rivals = [m for m in contest.methods if m != ahead and not contest.beats(ahead, m)]
    over = f" over {_listed(rivals)}" if len(rivals) < len(contest.methods) - 1 else ""
    size = _size(standing, contest.detectable_lead(ahead, rivals))
    return f"; the smallest lead{over} that would have shown in 80 % of repeats is {size}"


def _secondary(standing: Standing, winner: str | None) -> str:
    """What the other measure shows, where it shows anything."""
    pairs = standing.contest.secondary_pairs
    if winner:
        agreed = [
            method
            for method in standing.contest.methods
            if method != winner and find_pair(pairs, winner, method).better == winner
        ]
        return f"; {_other_measure(standing)} agrees against {_listed(agreed)}" if agreed else ""
    best = [
        one
        for one in standing.contest.methods
        if all(
            find_pair(pairs, one, other).better == one
            for other in standing.contest.methods
            if other != one
        )
    ]
    return f"; in {_other_measure(standing)} {best[0]} is better than every other" if best else ""


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
