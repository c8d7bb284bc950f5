"""The page of `loralab evaluate --forgetting`: gain on the task against what the base forgets."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import charts, formats
from loralab.reports.blocks import Cell, Column, Facts, Figure, FigureGrid, Page, Section, Table
from loralab.reports.parts import figure_cell, share_cell
from loralab.reports.trade_off import trade_off_chart

Row = Mapping[str, Any]
DIAL_NAMES = {"scale": "scale of the deltas", "cap": "cap of singular values"}


def forgetting_page(document: Row) -> Page:
    """The page of the document; parts that are missing are left out."""
    points: Sequence[Row] = document.get("points") or ()
    rows = document.get("rows") or {}
    sections = (_picture(document, points), _table(points)) if points else ()
    return Page(
        title=f"Forgetting of {document.get('source', 'an adapter')}",
        kicker=f"Gain and forgetting · {document.get('source', '')} on {document.get('base', '')}",
        headline=str(document.get("verdict") or ""),
        facts=Facts(
            (
                ("text to keep", str(document.get("keep")), ""),
                ("budget", f"{document.get('budget')} nats a token", ""),
                ("task rows", _counts(rows.get("task")), ""),
                ("rows of text", _counts(rows.get("keep")), ""),
            )
        ),
        sections=sections,
    )


def _counts(rows: Any) -> str:
    if not rows:
        return formats.MISSING
    return f"{formats.exact(rows['choose'])} to choose, {formats.exact(rows['confirm'])} fresh"


def _name(point: Row) -> str:
    suffix = "" if point["dial"] == "scale" else " x onset"
    return f"{point['value']:g}{suffix}"


def _picture(document: Row, points: Sequence[Row]) -> Section:
    names = [DIAL_NAMES[dial] for dial in dict.fromkeys(str(point["dial"]) for point in points)]
    styles = tuple(charts.swatches(names).values())
    rows = [
        {
            "dial": DIAL_NAMES[str(point["dial"])],
            "name": _name(point),
            "value": point["value"],
            "forgotten": point["forgotten"]["mean"],
            "least": point["forgotten"]["low"],
            "most": point["forgotten"]["high"],
            "gain": point["gain"]["mean"],
            "low": point["gain"]["low"],
            "high": point["gain"]["high"],
        }
        for point in points
        if point["forgotten"]["mean"] is not None and point["gain"]["mean"] is not None
    ]
    spec = trade_off_chart(
        rows,
        styles,
        budget=document.get("budget"),
        x_title="forgotten of the text, nats a token",
        y_title=f"gained on the task, {document.get('unit', 'nats')}",
        description="Gain on the task against forgetting, by setting of each dial",
    )
    caption = (
        "Each point is the adapter at one setting, with 95 % intervals both ways; up and to the"
        " left is better. The dashed line is the budget."
    )
    figure = Figure("trade-off", "Gain against forgetting", spec, legend=styles)
    grid = FigureGrid(caption, (figure,), (), broad=True)
    return Section("trade-off", "What a weaker adapter gains and forgets", "Trade-off", (grid,))


def _table(points: Sequence[Row]) -> Section:
    rows = tuple(
        (
            Cell(_name(point), strong=bool(point["chosen"])),
            Cell(DIAL_NAMES[str(point["dial"])]),
            figure_cell(point["gain"], 4),
            share_cell(point["gained_accuracy"]),
            figure_cell(point["forgotten"], 4),
            Cell(formats.number(point["forgotten"]["upper"], 4)),
            Cell("chosen" if point["chosen"] else "" if point["holds"] else "over the budget"),
        )
        for point in points
    )
    columns = (
        Column("setting", numeric=False),
        Column("dial", numeric=False),
        Column("gain", "nats, 95 % interval"),
        Column("gained accuracy", "95 % interval"),
        Column("forgotten", "nats a token, 95 % interval"),
        Column("forgotten at most", "one-sided 97.5 %"),
        Column("", numeric=False),
    )
    note = (
        "Gain and forgetting are against the base without any delta (its head, where it has one,"
        " stays). Each dial is tested from its weakest setting up, at half of the 5 % error; of"
        " those that hold, the one of the largest gain is chosen."
    )
    table = Table("On the rows for choosing.", columns, rows, note=note)
    return Section("settings", "Every setting", "Settings", (table,))
