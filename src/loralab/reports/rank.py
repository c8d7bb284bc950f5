"""The page of `loralab rank`: quality against size, the choice, and what the figures rest on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.reports import charts, formats, heatmaps
from loralab.reports.blocks import (
    Cell,
    Column,
    Facts,
    Figure,
    FigureGrid,
    Note,
    Notes,
    Page,
    Section,
    Table,
)
from loralab.reports.cost_chart import cost_chart, level_line
from loralab.reports.parts import count_cell, figure_cell, share_cell, size_cell, table_of

Row = Mapping[str, Any]
RULE_NAMES = {"uniform": "one rank for all", "global": "one threshold"}
INTERVAL = "95 % interval"


def rank_page(document: Row) -> Page:
    """The page of what `loralab rank --json` prints; parts that are missing are left out."""
    sections = (
        _curve_section(document),
        _candidate_section(document),
        _pattern_section(document),
        _trained_section(document),
        _reading_section(document),
    )
    full = document.get("full") or {}
    rows = document.get("rows") or {}
    return Page(
        title=f"Rank of {document.get('source', 'an adapter')}",
        kicker=f"Which rank is enough · {document.get('source', '')} on {document.get('base', '')}",
        headline=str(document.get("verdict") or ""),
        facts=Facts(
            (
                ("rank as trained", formats.exact(full.get("rank")), ""),
                ("size", formats.data_size(full.get("bytes")), ""),
                ("tolerance", f"{document.get('tolerance')} {document.get('unit', 'nats')}", ""),
                ("chosen on", f"{formats.exact(rows.get('choose'))} rows", ""),
                ("confirmed on", f"{formats.exact(rows.get('confirm'))} rows", ""),
            )
        ),
        sections=tuple(section for section in sections if section is not None),
    )


def _curve_section(document: Row) -> Section | None:
    curve: Sequence[Row] = document.get("curve") or ()
    if not curve:
        return None
    unit = str(document.get("unit", "nats"))
    lost = _figure("lost", "lost log-likelihood", curve, "lost_nll", unit, ".3~r")
    tolerance = document.get("tolerance")
    if tolerance is not None:
        line = level_line(float(tolerance), unit, "tolerance")
        lost = replace(lost, spec={**lost.spec, "layer": [*lost.spec["layer"], *line]})
    accuracy = _figure(
        "lost-accuracy", "lost accuracy", curve, "lost_accuracy", "lost accuracy", ".1~%"
    )
    figures = (lost, accuracy)
    caption = (
        "What each truncation loses against the whole adapter, paired by row, with its 95 %"
        " interval, against its size; the figures are in the table below. Below zero: the"
        " truncation is better than the whole."
    )
    return Section(
        "curve", "Quality against size", "Curve", (FigureGrid(caption, figures, (), broad=True),)
    )


def _figure(
    key: str, title: str, curve: Sequence[Row], measure: str, unit: str, number: str
) -> Figure:
    names = [RULE_NAMES[rule] for rule in dict.fromkeys(str(row["rule"]) for row in curve)]
    styles = tuple(charts.swatches(names).values())
    rows = [
        {
            "method": RULE_NAMES[str(row["rule"])],
            "cost": row["bytes"],
            **{end: row[measure][end] for end in ("mean", "low", "high")},
            "cost_text": f"rank {row['rank']}, {formats.data_size(row['bytes'])}",
            "quality_text": formats.number(row[measure]["mean"], 4),
        }
        for row in curve
        if row[measure]["mean"] is not None
    ]
    spec = cost_chart(
        rows,
        styles,
        cost_title="size of the adapter",
        cost_kind="bytes",
        quality_title=unit,
        quality_format=number,
        description=f"{title} by size of the truncated adapter",
    )
    return Figure(key, title, spec, legend=styles)


def _candidate_section(document: Row) -> Section | None:
    curve: Sequence[Row] = document.get("curve") or ()
    if not curve:
        return None
    full = document.get("full") or {}
    whole = (
        Cell(f"{full.get('rank')}, whole"),
        Cell("as trained"),
        size_cell(full.get("bytes")),
        count_cell(full.get("parameters")),
        Cell(""),
        Cell(formats.number(full.get("nll"), 4)),
        Cell(""),
        Cell(""),
        Cell(formats.percent(full.get("accuracy"))),
        Cell(""),
        Cell(""),
    )
    rows = [
        (
            Cell(str(row["rank"]), strong=bool(row["chosen"])),
            Cell(RULE_NAMES[str(row["rule"])]),
            size_cell(row["bytes"]),
            count_cell(row["parameters"]),
            Cell(formats.percent(row["relative_error"])),
            Cell(formats.number(row["nll"], 4)),
            figure_cell(row["lost_nll"], 4),
            Cell(formats.number(row["lost_nll"]["upper"], 4)),
            Cell(formats.percent(row["accuracy"])),
            share_cell(row["lost_accuracy"]),
            Cell(_state(row), strong=bool(row["chosen"])),
        )
        for row in curve
    ]
    columns = (
        Column("rank", numeric=False),
        Column("rule", numeric=False),
        Column("size"),
        Column("parameters"),
        Column("left out", "of the deltas' norm"),
        Column("neg. log-likelihood"),
        Column("lost", INTERVAL),
        Column("lost at most", "one-sided 95 %"),
        Column("accuracy"),
        Column("lost accuracy", INTERVAL),
        Column("", numeric=False),
    )
    table = Table("On the rows for choosing.", columns, (whole, *rows))
    return Section("candidates", "Every candidate", "Candidates", (table,))


def _state(row: Row) -> str:
    if row["chosen"]:
        return "chosen"
    return "" if row["holds"] else "over the tolerance"


def _pattern_section(document: Row) -> Section | None:
    chosen = (document.get("choices") or {}).get("global")
    if not chosen:
        return None
    ranks: Mapping[str, int] = chosen["ranks"]
    rows = [
        {"block": block, "kind": kind, "module": name, "value": value}
        for name, value in ranks.items()
        for block, kind in [_place(name)]
    ]
    spec = heatmaps.layer_heat_map(
        rows,
        title="rank",
        number_format="d",
        description="Rank of each module under one threshold on all singular values",
    )
    caption = "The smallest allowed spread of the same size: one threshold on all singular values."
    columns = (Column("module", numeric=False), Column("rank"))
    by_block = sorted(ranks.items(), key=lambda item: _in_order(item[0]))
    table = Table("", columns, tuple((Cell(n), Cell(str(r))) for n, r in by_block), wide=False)
    figure = Figure("ranks", "rank by module", spec)
    grid = FigureGrid(caption, (figure,), (table,), broad=True)
    return Section("pattern", "A rank for each module", "Modules", (grid,))


def _place(module: str) -> tuple[int | str, str]:
    """The block's number and what the module is called within a block."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "other", module
    return int(parts[number]), ".".join(parts[number + 1 :])


def _in_order(module: str) -> tuple[bool, int | str, str]:
    """Blocks by their numbers, then what is outside of them."""
    block, kind = _place(module)
    return isinstance(block, str), block, kind


def _trained_section(document: Row) -> Section | None:
    trained: Sequence[Row] = document.get("trained") or ()
    if not trained:
        return None
    columns = (
        (Column("rank", numeric=False), lambda row: Cell(str(row["rank"]))),
        (Column("parameters"), lambda row: count_cell(row["parameters"])),
        (Column("size"), lambda row: size_cell(row["bytes"])),
        *(
            column
            for arm in ("trained", "truncated")
            for column in (
                (Column(f"{arm}: neg. log-l.", INTERVAL), _measured(figure_cell, arm, "nll")),
                (Column(f"{arm}: accuracy", INTERVAL), _measured(share_cell, arm, "accuracy")),
            )
        ),
        (
            Column("trained minus truncated", "neg. log-likelihood"),
            lambda row: figure_cell(row.get("difference"), 4),
        ),
    )
    note = (
        "One seed each, from the same settings with alpha raised with the rank; the intervals are"
        " over rows alone, so a small difference may be the seed's."
    )
    table = table_of("On the confirming rows.", trained, columns, note=note)
    return Section("trained", "Trained at each rank instead", "Trained", (table,))


def _measured(cell: Callable[[Any], Cell], arm: str, name: str) -> Callable[[Row], Cell]:
    """The cell of a figure of the training at a rank, or of the truncation to it."""
    return lambda row: cell((row.get(arm) or {}).get(name))


def _reading_section(document: Row) -> Section:
    rows = document.get("rows") or {}
    notes = [
        Note(
            "info",
            "How it was chosen",
            "The candidates were tested from the highest rank down, in an order fixed before any"
            " row was looked at, and the last before the first failure is the choice: so the chance"
            " of choosing one that truly loses more than the tolerance is at most 5 %, however"
            " many were tried.",
        ),
        Note(
            "info",
            "What it was confirmed on",
            f"{formats.exact(rows.get('confirm'))} rows that had no part in choosing. A loss there"
            " above the tolerance does not change the choice, it says to distrust it.",
        ),
    ]
    refined = document.get("refined")
    if refined:
        fresh = refined["confirm"]["lost_nll"]
        kept = "is saved" if refined["kept"] else "was no better and is not saved"
        notes.append(
            Note(
                "ok" if refined["kept"] else "info",
                f"Refined for {refined['steps']} steps",
                f"The refined adapter {kept}; on the confirming rows it loses"
                f" {formats.number(fresh['mean'], 4)} ({formats.number(fresh['low'], 4)} to"
                f" {formats.number(fresh['high'], 4)}) against the whole one.",
            )
        )
    return Section("reading", "How to read this", "Reading", (Notes(tuple(notes)),))
