"""Truncations of one adapter, scored on rows: the curve, the choice and its confirmation."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.adapters import Adapter, Decomposed, num_bytes
from loralab.errors import AdapterError, ConfigError
from loralab.events import Listener, Phase, Progress, ignore
from loralab.evidence import (
    Candidate,
    RowScores,
    Rule,
    chosen_index,
    confirmation,
    rank_curve,
    rank_verdict,
)
from loralab.runs.subject import HeldOut, Subject, groups_of

RANKS = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Half octaves; those below the adapter's own rank are tried."""

RULES: tuple[Rule, ...] = ("uniform", "global")


@dataclass(frozen=True)
class Asked:
    """What is measured (`rules`, falling `ranks`), and how it is decided."""

    tolerance: float
    rule: Rule
    rules: tuple[Rule, ...]
    ranks: tuple[int, ...]


def falling(ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks from the largest to the smallest. Raises `ConfigError` where one is none."""
    bad = [rank for rank in ranks if rank < 1]
    if bad or not ranks:
        raise ConfigError(
            f"ranks to try: {', '.join(map(str, bad)) or 'none'}", "give whole numbers above 0."
        )
    return tuple(sorted(set(ranks), reverse=True))


@dataclass(frozen=True)
class Measured:
    """A subject on its rows: the document, and what it was made from.

    reference: the whole adapter's scores on the choosing rows; fresh: on the confirming ones.
    """

    subject: Subject
    rows: HeldOut
    whole: Decomposed
    reference: RowScores
    fresh: RowScores
    document: dict[str, Any]

    @property
    def chosen(self) -> Adapter:
        """The adapter that the document chose; the whole one where none was."""
        chosen = self.document["chosen"]
        return self.whole.adapter if chosen is None else self.whole.truncated(chosen["ranks"])


def measure(subject: Subject, rows: HeldOut, asked: Asked, listen: Listener = ignore) -> Measured:
    """Every candidate on the choosing rows, the choice, and the choice on the confirming rows."""
    whole = decompose(subject)
    reference = subject.scores(subject.adapter, rows.choose)
    candidates = list(_scored(subject, whole, rows, asked, listen))
    curve = rank_curve(reference, candidates, asked.tolerance, groups_of(rows.choose))
    listen(Phase(f"confirming on {len(rows.confirm)} rows"))
    fresh = subject.scores(subject.adapter, rows.confirm)
    document = {
        "source": subject.source,
        "base": subject.config.model.name,
        "task": subject.config.model.task,
        "unit": "nats a token" if subject.config.model.task == "causal" else "nats a row",
        "tolerance": asked.tolerance,
        "rule": asked.rule,
        "rows": rows.facts(),
        "full": _full(whole, reference),
        "curve": curve,
    }
    measured = Measured(subject, rows, whole, reference, fresh, document)
    document |= _choices(measured, candidates)
    document["verdict"] = rank_verdict(document)
    return measured


def decompose(subject: Subject) -> Decomposed:
    """The SVDs of its deltas. Raises `AdapterError` where it has none, or all of them are zero."""
    whole = Decomposed(subject.adapter)
    if not whole.svds:
        raise AdapterError(
            f"{subject.source} holds no factor pairs (only"
            f" {', '.join(subject.adapter.whole_modules) or 'whole tensors'}): there is no rank to"
            " choose",
            "give an adapter that has targets.",
        )
    if not any(float(svd.S.max()) for svd in whole.svds.values()):
        raise AdapterError(
            f"{subject.source} changes nothing: B is zero in all {len(whole.svds)} modules, so that"
            " every rank is as good as another",
            "it was never trained, or not what was trained was saved: train it first.",
        )
    return whole


def _full(whole: Decomposed, reference: RowScores) -> dict[str, Any]:
    adapter = whole.adapter
    return {
        "rank": whole.rank,
        "parameters": adapter.num_parameters,
        "bytes": num_bytes(adapter),
        "modules": len(adapter.pairs),
        **reference.figures(),
    }


def _scored(
    subject: Subject, whole: Decomposed, rows: HeldOut, asked: Asked, listen: Listener
) -> Iterator[Candidate]:
    """Every candidate of each rule, by falling rank."""
    wanted = [size for size in asked.ranks if size < whole.rank]
    if not wanted:
        raise ConfigError(
            f"{subject.source} has rank {whole.rank}, and no smaller rank is to be tried",
            "give --ranks below it, or train at a higher rank.",
        )
    listen(Phase("candidates", len(wanted) * len(asked.rules), "adapters"))
    for done, (rule, size) in enumerate(itertools.product(asked.rules, wanted), start=1):
        ranks = whole.uniform_ranks(size) if rule == "uniform" else whole.global_ranks(size)
        adapter = whole.truncated(ranks)
        yield Candidate(
            rule=rule,
            rank=size,
            ranks=ranks,
            num_parameters=adapter.num_parameters,
            num_bytes=num_bytes(adapter),
            relative_error=whole.relative_error(ranks),
            scores=subject.scores(adapter, rows.choose),
        )
        listen(Progress(done))


def _choices(measured: Measured, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Each rule's choice with its confirmation; `chosen` is that of the rule decided on."""
    found: dict[str, dict[str, Any] | None] = {}
    document, fresh_rows = measured.document, measured.rows.confirm
    rules: list[Rule] = list(dict.fromkeys(candidate.rule for candidate in candidates))
    for rule in rules:
        index = chosen_index(document["curve"], rule)
        if index is None:
            found[rule] = None
            continue
        ranks = candidates[index].ranks
        scores = measured.subject.scores(measured.whole.truncated(ranks), fresh_rows)
        confirmed = confirmation(
            measured.fresh, scores, document["tolerance"], groups_of(fresh_rows)
        )
        found[rule] = {**document["curve"][index], "ranks": dict(ranks), "confirm": confirmed}
    return {"choices": found, "chosen": found[document["rule"]]}
