"""A run of an image model -> a page: its images, what judges say of them, curves, settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loralab.reports import charts, formats, series
from loralab.reports.blocks import (
    Cell,
    Column,
    Figure,
    FigureGrid,
    Gallery,
    Page,
    Section,
    Strip,
    Swatch,
    Table,
)
from loralab.reports.facts import data_section, settings_section
from loralab.reports.parts import figure_cell, share_cell, table_of
from loralab.reports.run import (
    command_section,
    cost_section,
    file_section,
    finding_section,
    headline_facts,
    schedule_figure,
)

Row = Mapping[str, Any]
BASE = "plain"


def image_page(run: Row) -> Page:
    """The page of a run of an image model; parts the run lacks are left out."""
    adapters = [str(name) for name in run.get("adapters") or ()]
    styles = _swatches(adapters)
    sections = [
        _gallery_section(run),
        _judge_section(run.get("judged") or {}, styles),
        _mix_section(run.get("judged") or {}, styles),
        _curve_section(run, styles),
        finding_section(run),
        cost_section(run),
        command_section(run),
        file_section(run),
        data_section(run),
        settings_section(run),
    ]
    return Page(
        title=f"{', '.join(adapters)} on {run.get('model')}",
        kicker=f"Training run · {run['run']}" if run.get("run") else "Training run",
        headline=_headline(run, adapters),
        facts=headline_facts(run),
        sections=tuple(section for section in sections if section is not None),
        footer=" · ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items()),
    )


def _swatches(adapters: Sequence[str]) -> dict[str, Swatch]:
    """A colour and a shape for each adapter; the base is grey."""
    known = charts.swatches(["lora", "full", "frozen", "head", *adapters[4:]]).values()
    styles = {
        name: replace(swatch, label=name) for name, swatch in zip(adapters, known, strict=False)
    }
    base = charts.swatches(["plain"])["plain"]
    return {BASE: replace(base, label=BASE, colour="#7f8a95"), **styles}


def _headline(run: Row, adapters: Sequence[str]) -> str:
    """One sentence: what learned what, and how often judges see it."""
    done = f"{run.get('model')} learned {', '.join(adapters)}: an adapter each on one frozen base"
    metrics = (run.get("judged") or {}).get("metrics") or {}
    if not metrics:
        return done
    style, digit = (share_cell(metrics[name]) for name in ("style_accuracy", "digit_accuracy"))
    return (
        f"{done}. A judge sees the style in {style.text} of the images (95 % interval"
        f" {style.detail}), the digit that was asked for in {digit.text} ({digit.detail})"
    )


def _gallery_section(run: Row) -> Section | None:
    sheets = run.get("sheets") or ()
    blocks = tuple(
        Gallery(
            heading=str(sheet["title"]),
            caption=str(sheet["caption"]),
            columns=tuple(sheet["columns"]),
            strips=tuple(_strip(strip, sheet["columns"]) for strip in sheet["strips"]),
        )
        for sheet in sheets
    )
    return Section("images", "Images", "Images", blocks) if blocks else None


def _strip(strip: Row, columns: Sequence[str]) -> Strip:
    name = " ".join(filter(None, (str(strip["label"]), str(strip["detail"]))))
    return Strip(
        str(strip["label"]),
        str(strip["detail"]),
        f"data:image/png;base64,{strip['png']}",
        f"{', '.join(columns)}: {name}",
    )


def _judge_section(judged: Row, styles: Mapping[str, Swatch]) -> Section | None:
    looks: Row = judged.get("looks") or {}
    if not looks:
        return None
    merged: Row = judged.get("merged") or {}
    count = judged["rows"] // len(looks)
    columns = (
        (Column("images", numeric=False), lambda row: Cell(row[0], swatch=styles.get(row[0]))),
        (
            Column("seen as that", "95 % interval"),
            lambda row: share_cell(row[1].get("style_accuracy")),
        ),
        (
            Column("the digit asked for", "95 % interval"),
            lambda row: share_cell(row[1].get("digit_accuracy")),
        ),
        (
            Column("Fréchet distance", "95 % interval"),
            lambda row: figure_cell(row[1].get("frechet_distance"), 1),
        ),
        (
            Column("merged, largest difference", "1 is half of black to white"),
            lambda row: Cell(formats.number(merged.get(row[0]), 6)),
        ),
    )
    checks = judged.get("judges") or {}
    note = "The Fréchet distance to real images lies in the judges' features; it grows as images "
    note += "become fewer, so only distances of equally many images compare."
    rows: list[Any] = list(looks.items())
    table = table_of(f"{count} images of each kind.", rows, columns, note=note, wide=False)
    lead = "Judges are two classifiers that saw real, held-out images only. Of real images that "
    lead += f"they had not seen they are right about {formats.percent(checks.get('digit'))} (digit)"
    lead += f" and {formats.percent(checks.get('look'))} (look). The plain images are the base's."
    return Section("judges", "What judges see", "Judges", (table,), lead)


def _mix_section(judged: Row, styles: Mapping[str, Swatch]) -> Section | None:
    mixes = judged.get("mixes") or ()
    if not mixes:
        return None
    figures = tuple(
        Figure(f"mix-{index}", f"{mix['start']} to {mix['end']}", _mix_chart(mix, styles))
        for index, mix in enumerate(mixes)
    )
    names = dict.fromkeys(name for mix in mixes for name in (mix["start"], mix["end"]))
    legend = tuple(styles[name] for name in names)
    weights = mixes[0]["weights"]
    columns = (
        Column("from", numeric=False),
        Column("to", numeric=False),
        *(Column(f"{weight:g}") for weight in weights),
        Column("monotone", numeric=False),
    )
    rows = tuple(
        (
            Cell(mix["start"], swatch=styles.get(mix["start"])),
            Cell(mix["end"], swatch=styles.get(mix["end"])),
            *(_ends(*pair) for pair in zip(mix["end_share"], mix["start_share"], strict=True)),
            Cell("yes" if mix["monotone"] else "no", strong=not mix["monotone"]),
        )
        for mix in mixes
    )
    caption = "The look judge's mean probability of the end (small: of the start) by the weight of "
    caption += f"the end, {mixes[0]['images_of_each']} images of each weight."
    table = Table(caption, columns, rows, wide=False)
    grid = FigureGrid("The judge's mean probability against the weight.", figures, (table,), legend)
    lead = "A route may mix adapters. As the weight moves from one look to another, so should what "
    lead += "the judge sees, without going back."
    return Section("mixes", "From one look to another", "Mixes", (grid,), lead)


def _ends(end: float, start: float) -> Cell:
    return Cell(formats.percent(end), detail=formats.percent(start), heat=round(10 * end))


def _mix_chart(mix: Row, styles: Mapping[str, Swatch]) -> charts.Spec:
    rows = [
        {"look": mix[end], "weight": weight, "share": share}
        for end in ("start", "end")
        for weight, share in zip(mix["weights"], mix[f"{end}_share"], strict=True)
    ]
    axis = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"tickCount": 4}}
    return charts.view(
        f"How the judge sees images from {mix['start']} to {mix['end']}",
        rows,
        mark={"type": "line", "strokeWidth": 1.75, "point": {"size": 30}},
        encoding={
            "x": {"field": "weight", "title": f"weight of {mix['end']}", **axis},
            "y": {"field": "share", "title": "probability", **axis},
            "color": _colours("look", [styles[mix["start"]], styles[mix["end"]]]),
            "tooltip": [
                {"field": "look", "type": "nominal"},
                {"field": "weight", "type": "quantitative"},
                {"field": "share", "type": "quantitative", "format": ".3f"},
            ],
        },
    )


def _colours(field: str, styles: Sequence[Swatch]) -> charts.Spec:
    scale = charts.by_method(styles, "colour")
    return {"field": field, "type": "nominal", "scale": scale, "legend": None}


def _curve_section(run: Row, styles: Mapping[str, Swatch]) -> Section | None:
    """Training loss of each adapter, and the learning rate."""
    train: Row = run.get("train") or {}
    if not train:
        return None
    lines = {name: _smoothed(name, losses) for name, losses in train.items()}
    legend = tuple(styles[name] for name in lines)
    figures = [Figure("loss", "Loss", _loss_chart(lines, legend), legend=legend)]
    columns = (Column("adapter", numeric=False), Column("first loss"), Column("last loss"))
    rows = tuple(
        (
            Cell(name, swatch=styles[name]),
            Cell(formats.number(line[0]["loss"], 4)),
            Cell(formats.number(line[-1]["loss"], 4)),
        )
        for name, line in lines.items()
    )
    tables = [Table("Training loss, averaged as in the chart.", columns, rows, wide=False)]
    rates: Row = run.get("learning_rates") or {}
    if rates:
        groups = tuple(charts.swatches(rates).values())
        spec, table = schedule_figure(rates, groups)
        figures.append(Figure("schedule", "Learning rate", spec, legend=groups))
        tables.append(table)
    caption = "Mean squared error of the predicted noise or velocity, averaged over a twentieth of"
    caption += " the steps."
    grid = FigureGrid(caption, tuple(figures), tuple(tables), broad=True)
    return Section("curves", "Training", "Training", (grid,))


def _loss_chart(lines: Mapping[str, list[dict[str, Any]]], styles: Sequence[Swatch]) -> charts.Spec:
    rows = [row for line in lines.values() for row in line]
    domain = series.padded_range(row["loss"] for row in rows)
    step = {"type": "quantitative", "scale": {"nice": False}, "axis": {"grid": False}}
    loss = {"type": "quantitative", "scale": {"domain": domain, "zero": False, "nice": False}}
    return charts.view(
        "Training loss of each adapter against the step",
        rows,
        mark={"type": "line", "strokeWidth": 1.5},
        encoding={
            "x": {"field": "step", "title": "step", **step},
            "y": {"field": "loss", "title": "loss", "axis": {"tickCount": 4}, **loss},
            "color": _colours("run", styles),
            "tooltip": [
                {"field": "run", "type": "nominal", "title": "adapter"},
                {"field": "step", "type": "quantitative", "format": ","},
                {"field": "loss", "type": "quantitative", "format": ".4f"},
            ],
        },
    )


def _smoothed(name: str, losses: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    span = series.smoothing_span(len(losses))
    return [
        {"run": name, "step": step, "loss": round(loss, 5)}
        for step, loss in series.smooth(losses, span)
    ]
