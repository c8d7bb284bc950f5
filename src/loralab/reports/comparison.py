"""comparison.json -> a page: the verdict, the methods, their differences, and all the evidence."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import formats
from loralab.reports.blocks import Bar, Cell, Column, Facts, Page, Section, Swatch, Table
from loralab.reports.charts import swatches
from loralab.reports.curves import cost_section, learning_rate_section, loss_section
from loralab.reports.details import (
    class_section,
    disagreement_section,
    economy_section,
    seed_section,
)
from loralab.reports.facts import data_section, settings_section
from loralab.reports.parts import count_cell, figure_cell, interval, share_cell, size_cell

Row = Mapping[str, Any]
_SIGNIFICANT = 0.05


def comparison_page(comparison: Row, loss_curves: Mapping[str, Sequence[Row]] | None) -> Page:
    """The page of a comparison; parts the comparison lacks are left out."""
    methods: Sequence[Row] = comparison.get("methods") or ()
    styles = swatches(str(row["method"]) for row in methods)
    sections = [
        _method_section(methods, styles, comparison.get("winner")),
        _pair_section(comparison),
        learning_rate_section(methods, styles, comparison.get("settings") or {}),
        loss_section(methods, styles, loss_curves or {}),
        class_section(methods, styles, comparison),
        cost_section(methods, styles),
        seed_section(methods, styles, comparison),
        economy_section(methods, styles, comparison),
        disagreement_section(comparison, styles),
        data_section(comparison),
        settings_section(comparison),
    ]
    winner = comparison.get("winner")
    names = ", ".join(str(row["method"]) for row in methods)
    return Page(
        title=f"Comparison of {names}" if names else "Comparison",
        kicker=" · ".join(["Comparison of fine-tuning methods", *_subject(comparison)]),
        headline=str(comparison.get("verdict") or "This comparison has no verdict."),
        status=f"Winner: {winner}" if winner else "",
        badge=styles.get(str(winner)) if winner else None,
        facts=_headline_facts(comparison, methods),
        sections=tuple(section for section in sections if section is not None),
        footer=_footer(comparison),
    )


def _subject(comparison: Row) -> list[str]:
    settings = comparison.get("settings") or {}
    model = (settings.get("model") or {}).get("name")
    data = (comparison.get("data") or {}).get("name") or (settings.get("data") or {}).get("name")
    return [str(name) for name in (model, data) if name]


def _headline_facts(comparison: Row, methods: Sequence[Row]) -> Facts:
    data = comparison.get("data") or {}
    rows = [("methods", str(len(methods)), "")]
    seeds = max((len(row.get("seeds") or ()) for row in methods), default=0)
    if seeds:
        rows.append(("seeds each", str(seeds), ""))
    if isinstance(steps := comparison.get("steps"), int):
        rows.append(("steps", formats.exact(steps), ""))
    for split in ("train", "validation", "test"):
        rows += _split_facts(split, data)
    return Facts(tuple(rows))


def _split_facts(split: str, data: Row) -> list[tuple[str, str, str]]:
    """Rows of a split, and its documents where these are fewer."""
    facts = (data.get("splits") or {}).get(split) or {}
    rows = facts.get("rows") or (data.get("rows") or {}).get(split)
    documents = facts.get("documents") or (data.get("documents") or {}).get(split)
    if rows is None:
        return []
    text = f"{formats.exact(rows)} rows"
    if documents is not None and documents != rows:
        text += f", {formats.exact(documents)} documents"
    return [(split, text, "")]


def _method_section(
    methods: Sequence[Row], styles: Mapping[str, Swatch], winner: Any
) -> Section | None:
    if not methods:
        return None
    has_accuracy = any(interval(row.get("accuracy"))[0] is not None for row in methods)
    main = "accuracy" if has_accuracy else "nll"
    has_f1 = any(row.get("macro_f1") is not None for row in methods)
    axis = _axis([end for row in methods for end in interval(row.get(main))])
    label = formats.percent if has_accuracy else (lambda value, _: formats.number(value, 3))
    ticks = tuple((axis.share(value), label(value, 1)) for value in axis.ends) if axis else ()
    columns = [Column("method", numeric=False)]
    columns += [Column("accuracy", "95 % interval")] if has_accuracy else []
    columns += [Column(f"{main}, drawn", ticks=ticks)] if axis else []
    columns += [Column("neg. log-likelihood", "95 % interval")]
    columns += [Column("macro F1", "95 % interval")] if has_f1 else []
    columns += [
        Column("best", "learning rate"),
        Column("trainable", "of all parameters"),
        Column("peak", "memory"),
        Column("a step"),
        Column("on disk"),
    ]
    rows = []
    for row in methods:
        name = str(row["method"])
        cells = [Cell(name, swatch=styles[name], strong=name == winner)]
        cells += [share_cell(row.get("accuracy"))] if has_accuracy else []
        cells += [_interval_bar(axis, row.get(main), styles[name])] if axis else []
        cells += [figure_cell(row.get("nll"))]
        cells += [share_cell(row.get("macro_f1"))] if has_f1 else []
        cells += [
            Cell(
                formats.rate(row.get("best_learning_rate")),
                detail="" if row.get("bracketed", True) else "on the grid's edge",
            ),
            _trainable_cell(row),
            size_cell(row.get("peak_bytes")),
            Cell(formats.duration(row.get("step_seconds"))),
            size_cell(row.get("artifact_bytes")),
        ]
        rows.append(tuple(cells))
    quality = "Accuracy and macro F1: higher is better. " if has_accuracy else ""
    table = Table(
        f"{quality}Negative log-likelihood in nats: lower is better. Every method at its best "
        "learning rate, on the same test rows; the mean over the seeds.",
        tuple(columns),
        tuple(rows),
        note="Peak memory and seconds a step were measured in a process of their own for each "
        "method. Overlapping intervals of two methods do not settle which is better: the paired "
        "differences below do.",
    )
    return Section("methods", "The methods", "Methods", (table,))


def _trainable_cell(row: Row) -> Cell:
    trainable = count_cell(row.get("trainable_parameters"))
    total = formats.finite(row.get("total_parameters"))
    part = formats.finite(row.get("trainable_parameters"))
    if total is None or part is None:
        return trainable
    share = part / total if total else 0
    decimals = 0 if share > 0.995 else 1 if share >= 0.01 else 3
    return Cell(
        trainable.text,
        detail=f"{formats.percent(share, decimals)} of {formats.count(total)}",
        title=f"{formats.exact(part)} of {formats.exact(total)}",
    )


class _Axis:
    """A linear axis on which cells draw their bars."""

    def __init__(self, low: float, high: float) -> None:
        self.ends = (low, high)

    def share(self, value: float) -> float:
        """The place of a value between the ends, kept inside them."""
        low, high = self.ends
        return min(1.0, max(0.0, (value - low) / (high - low)))


def _axis(values: Sequence[float | None], *, around_zero: bool = False) -> _Axis | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    if around_zero:
        high = max(map(abs, known)) or 1e-9
        low = -high
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return _Axis(low, high)


def _interval_bar(axis: _Axis, value: Any, swatch: Swatch) -> Cell:
    mean, low, high = interval(value)
    if mean is None:
        return Cell("")
    ends = [mean if end is None else end for end in (low, high)]
    bar = Bar(axis.share(ends[0]), axis.share(mean), axis.share(ends[1]), colour=swatch.colour)
    return Cell("", bar=bar)


def _pair_section(comparison: Row) -> Section | None:
    by_accuracy = _forest(
        comparison.get("pairs") or (),
        "Difference in accuracy, percentage points (first method minus second): above zero the "
        "first is better.",
        formats.points,
        "Accuracy",
    )
    by_nll = _forest(
        comparison.get("nll_pairs") or (),
        "Difference in negative log-likelihood, nats (first method minus second): below zero the "
        "first is better.",
        _nats,
        "Log-likelihood",
    )
    primary = comparison.get("primary")
    order = (by_nll, by_accuracy) if primary == "nll" else (by_accuracy, by_nll)
    tables = tuple(table for table in order if table.rows)
    if not tables:
        return None
    lead = (
        "The verdict rests on these. Each row compares two methods on the same test rows, with "
        "the spread between seeds in the interval. The grey band is what this comparison could "
        "easily have missed: a true difference as large as its edge shows in 80 % of repeats."
    )
    if primary in ("accuracy", "nll"):
        measures = ("accuracy", "log-likelihood")
        decides, other = measures if primary == "accuracy" else measures[::-1]
        lead += f" Only {decides} can make a winner; {other} can only take a win away."
    return Section("differences", "Paired differences", "Differences", tables, lead)


def _nats(difference: Any) -> str:
    return formats.number(difference, 4, signed=True)


def _forest(pairs: Sequence[Row], caption: str, write: Any, heading: str) -> Table:
    """A forest plot whose rows are the rows of a table."""
    ends = [
        formats.finite(pair.get(key))
        for pair in pairs
        for key in ("low", "high", "difference", "detectable_difference")
    ]
    axis = _axis(ends, around_zero=True) or _Axis(-1.0, 1.0)
    ticks = tuple((axis.share(value), write(value)) for value in (axis.ends[0], 0.0, axis.ends[1]))
    columns = (
        Column("pair", numeric=False),
        Column("drawn", ticks=ticks, bar_width=240),
        Column("difference"),
        Column("95 % interval"),
        Column("p", "Holm-corrected"),
        Column("detectable", "80 % power"),
    )
    rows = tuple(_forest_row(pair, axis, write) for pair in pairs)
    note = "A filled point marks a difference with p < 0.05 after correction."
    return Table(caption, columns, rows, note=note, heading=heading)


def _forest_row(pair: Row, axis: _Axis, write: Any) -> tuple[Cell, ...]:
    difference, low, high = interval(pair)
    p = formats.finite(pair.get("p"))
    significant = p is not None and p < _SIGNIFICANT
    detectable = formats.finite(pair.get("detectable_difference"))
    bar = None
    if difference is not None:
        band = None if detectable is None else (axis.share(-detectable), axis.share(detectable))
        ends = [difference if end is None else end for end in (low, high)]
        low_x, x, high_x = (axis.share(place) for place in (ends[0], difference, ends[1]))
        bar = Bar(low_x, x, high_x, zero=axis.share(0.0), band=band, hollow=not significant)
    return (
        Cell(f"{pair.get('a')} − {pair.get('b')}"),
        Cell("", bar=bar),
        Cell(write(difference), strong=significant),
        Cell(formats.span(write(low), write(high))),
        Cell(formats.p_value(p), title=_p_title(pair)),
        Cell("—" if detectable is None else f"±{write(detectable).lstrip('+')}"),
    )


def _footer(comparison: Row) -> str:
    versions = comparison.get("versions") or {}
    if not isinstance(versions, Mapping):
        return ""
    return " · ".join(f"{name} {version}" for name, version in versions.items())


def _p_title(pair: Row) -> str:
    p, raw = formats.finite(pair.get("p")), formats.finite(pair.get("p_raw"))
    parts = [] if p is None else [f"{p:.3g}"]
    parts += [] if raw is None else [f"before correction {raw:.3g}"]
    return ", ".join(parts)
