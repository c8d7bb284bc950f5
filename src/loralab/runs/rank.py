"""`loralab rank`: how small an adapter can be made before it loses more than is tolerable."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from loralab.adapters import Adapter, write_adapter
from loralab.config import load_config
from loralab.errors import ConfigError, Interrupted, OutputError
from loralab.events import Listener, Note, Phase, ignore
from loralab.evidence import Rule, losses
from loralab.files import write_json
from loralab.reports import write_rank_report
from loralab.runs.folder import refuse_existing
from loralab.runs.rank_measuring import RANKS, RULES, Asked, Measured, falling, measure
from loralab.runs.rank_trainings import (
    HIGH_RANK,
    check_folder,
    refine,
    train_high,
    trained_at,
    truncations,
)
from loralab.runs.subject import groups_of, held_out, open_subject

TOLERANCE = 0.01
"""Nats: the right answer's probability falls by 1 % in the geometric mean."""

DOCUMENT, REPORT = "rank.json", "report.html"


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
    high: int = HIGH_RANK,
    rates: Sequence[float] = (),
    trained: Sequence[int] = (),
    refine_steps: int = 0,
    output: str | Path | None = None,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """The smallest rank of an adapter that loses no more than `tolerance` nats.

    source: a finished LoRA run, an adapter's folder, or a recipe, which is trained once at rank
    `high`, at the best of `rates` where some are given. data: held-out rows (a file, a catalogue
    name, ...) instead of the run's own. rule: which of the curves is decided on; rules: which are
    measured. ranks: which are tried, as far as they are below the adapter's own. trained: ranks
    that are trained too, for comparison. refine_steps: of further training of the chosen adapter.
    output: a folder for the adapter, rank.json and report.html; started again on it after an
    interruption, the trainings in it are used.

    Returns the document that docs/rank.md describes. Raises any `LoralabError`.
    """
    check_tolerance(tolerance)
    asked = Asked(tolerance, rule, tuple(dict.fromkeys((rule, *rules))), falling(ranks))
    is_recipe = not Path(source).is_dir()
    if is_recipe and output is None:
        output = _default_folder(source)
    _check_output(output, trains=is_recipe or bool(trained))
    try:
        if is_recipe and output is not None:
            run = train_high(
                load_config(source, overrides), Path(output), high=high, rates=rates, listen=listen
            )
            source, overrides = run.folder, ()
        subject = open_subject(source, base=base, data=data, overrides=overrides)
        measured = measure(subject, held_out(subject, data, listen), asked, listen)
        adapter = measured.chosen
        if refine_steps:
            adapter = _refined(measured, adapter, refine_steps, listen)
        if trained:
            measured.document["trained"] = _trained(measured, trained, output, listen)
    except (KeyboardInterrupt, Interrupted):
        if output is None:
            raise
        raise Interrupted(
            f"interrupted; what is trained is kept in {output}",
            f"start the same command again with --output {output}.",
        ) from None
    if output is not None:
        _store(measured, adapter, Path(output))
    return measured.document


def check_tolerance(tolerance: float) -> None:
    """Raises `ConfigError` unless it is a finite number above zero."""
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError(
            f"tolerance {tolerance:g} nats: no truncation loses that little for certain",
            f"give a tolerance above 0; {TOLERANCE:g} is the default.",
        )


def _default_folder(recipe: str | Path) -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"rank-{Path(recipe).stem}-{stamp}"


def _check_output(output: str | Path | None, *, trains: bool) -> None:
    if output is None:
        if trains:
            raise OutputError("--output is missing: where the trainings go", "name a new folder.")
    elif trains:
        check_folder(Path(output))
    else:
        refuse_existing(Path(output))


def _refined(measured: Measured, adapter: Adapter, steps: int, listen: Listener) -> Adapter:
    """The refined adapter where it is better on the choosing rows, else `adapter`.

    What both lose, on both parts of the rows, goes into the document.
    """
    if measured.document["chosen"] is None:
        listen(Note("nothing was truncated, so nothing is refined", warning=True))
        return adapter
    subject, rows = measured.subject, measured.rows
    better = refine(subject, adapter, steps, listen)
    listen(Phase("scoring the refined adapter"))
    found = losses(measured.reference, subject.scores(better, rows.choose), groups_of(rows.choose))
    fresh = losses(measured.fresh, subject.scores(better, rows.confirm), groups_of(rows.confirm))
    before = measured.document["chosen"]
    kept = found["nll"] < before["nll"]
    measured.document["refined"] = {"steps": steps, "kept": kept, **found, "confirm": fresh}
    return better if kept else adapter


def _trained(
    measured: Measured, ranks: Sequence[int], output: str | Path | None, listen: Listener
) -> list[dict[str, Any]]:
    assert output is not None  # `_check_output` has seen to it
    wanted = falling(ranks)
    cut = dict(truncations(measured.whole, wanted))
    return trained_at(wanted[::-1], measured.subject, measured.rows, cut, Path(output), listen)


def _store(measured: Measured, adapter: Adapter, output: Path) -> None:
    """Write the adapter with probes of its own, the document and the page into the folder."""
    document = measured.document
    probes = measured.subject.probes(adapter, measured.rows.choose)
    write_adapter(replace(adapter, probes=probes), output / "adapter")
    document["adapter"] = str(output / "adapter")
    document["report"] = str(output / REPORT)
    write_rank_report(document, output / REPORT)
    write_json(output / DOCUMENT, document)
