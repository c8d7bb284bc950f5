"""`loralab rank`: how small an adapter can be made before it loses more than is tolerable."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.adapters import Adapter, Decomposed, num_bytes, write_adapter
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
from loralab.files import write_json
from loralab.runs.folder import refuse_existing
from loralab.runs.subject import HeldOut, Subject, groups_of, held_out, open_subject

TOLERANCE = 0.01
"""Nats: the right answer's probability falls by 1 % in the geometric mean."""

RANKS = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
RULES: tuple[Rule, ...] = ("uniform", "global")


def rank(
    source: str | Path,
    *,
    data: str | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    rule: Rule = "uniform",
    rules: Sequence[Rule] = RULES,
    ranks: Sequence[int] = RANKS,
    output: str | Path | None = None,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """The smallest rank of the adapter in `source` that loses no more than `tolerance` nats.

    source: a finished LoRA run, or an adapter's folder. data: held-out rows (a file, a catalogue
    name, ...) instead of the run's own. rule: which of the curves is decided on; rules: which are
    measured. ranks: which are tried, as far as they are below the adapter's own. output: a new
    folder for the truncated adapter, rank.json and report.html.

    Returns the document that docs/rank.md describes. Raises any `LoralabError` of what does not fit
    together.
    """
    check_tolerance(tolerance)
    if output is not None:
        refuse_existing(Path(output))
    subject = open_subject(source, base=base, data=data, overrides=overrides)
    rows = held_out(subject, data, listen)
    asked = Asked(tolerance, rule, tuple(dict.fromkeys((rule, *rules))), falling(ranks))
    document = examine(subject, rows, asked, listen)
    if output is not None:
        store(subject, document, Path(output))
    return document


def check_tolerance(tolerance: float) -> None:
    """Raises `ConfigError` unless it is a finite number above zero."""
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError(
            f"tolerance {tolerance:g} nats: no truncation loses that little for certain",
            f"give a tolerance above 0; {TOLERANCE:g} is the default.",
        )


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


def examine(
    subject: Subject, rows: HeldOut, asked: Asked, listen: Listener = ignore
) -> dict[str, Any]:
    """The document of a subject on its rows."""
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
    document |= _choices(subject, candidates, document, rows, fresh)
    document["verdict"] = rank_verdict(document)
    return document


def decompose(subject: Subject) -> Decomposed:
    """The SVDs of its deltas. Raises `AdapterError` where it has none."""
    whole = Decomposed(subject.adapter)
    if not whole.svds:
        raise AdapterError(
            f"{subject.source} holds no factor pairs (only"
            f" {', '.join(subject.adapter.whole_modules) or 'whole tensors'}): there is no rank to"
            " choose",
            "give an adapter that has targets.",
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


def _choices(
    subject: Subject,
    candidates: Sequence[Candidate],
    document: dict[str, Any],
    rows: HeldOut,
    fresh: RowScores,
) -> dict[str, Any]:
    """Each rule's choice with its confirmation; `chosen` is that of the rule decided on."""
    found: dict[str, dict[str, Any] | None] = {}
    whole = Decomposed(subject.adapter)
    rules: list[Rule] = list(dict.fromkeys(candidate.rule for candidate in candidates))
    for rule in rules:
        index = chosen_index(document["curve"], rule)
        if index is None:
            found[rule] = None
            continue
        ranks = candidates[index].ranks
        scores = subject.scores(whole.truncated(ranks), rows.confirm)
        confirmed = confirmation(fresh, scores, document["tolerance"], groups_of(rows.confirm))
        found[rule] = {**document["curve"][index], "ranks": dict(ranks), "confirm": confirmed}
    return {"choices": found, "chosen": found[document["rule"]]}


def truncated(subject: Subject, document: dict[str, Any]) -> Adapter:
    """The adapter that the document chose; the whole one where none was."""
    chosen = document["chosen"]
    return subject.adapter if chosen is None else decompose(subject).truncated(chosen["ranks"])


def store(subject: Subject, document: dict[str, Any], output: Path) -> None:
    """Write the chosen adapter and the document into the folder."""
    write_adapter(truncated(subject, document), output / "adapter")
    document["adapter"] = str(output / "adapter")
    write_json(output / "rank.json", document)
