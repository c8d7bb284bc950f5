"""A memory plan -> a page: the step as a stacked area, what holds the peak, what would help."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import charts, formats
from loralab.reports.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Figure,
    FigureGrid,
    Page,
    Section,
    Table,
)
from loralab.reports.parts import count_cell, facts_table, size_cell

Document = Mapping[str, Any]

SHOWN_KINDS = 8
"""Kinds of bytes with a colour of their own; the smaller ones are drawn as one."""

REST = "the rest"


def plan_page(plan: Document) -> Page:
    """The page of a plan; parts it lacks are left out."""
    sections = [
        _curve_section(plan),
        _parts_section(plan),
        _lever_section(plan),
        _method_section(plan),
        _serving_section(plan),
    ]
    fits = "fits" if plan.get("fits") else "does not fit"
    peak = formats.data_size(plan.get("peak_bytes"))
    capacity = formats.data_size(plan.get("capacity_bytes"))
    name = str(plan.get("model") or "the model")
    return Page(
        title=f"Memory of {name}",
        kicker=f"Memory plan · {plan.get('method', '')} · step: {plan.get('step', '')}",
        headline=f"{name} needs {peak} at its peak and {fits} {plan.get('device')} ({capacity})",
        status=str(plan.get("estimated") or ""),
        facts=_facts(plan),
        sections=tuple(section for section in sections if section is not None),
    )


def _facts(plan: Document) -> Facts:
    bar = formats.percent(plan.get("error_bar"), 0)
    rows = [
        ("peak", formats.data_size(plan.get("peak_bytes")), formats.exact(plan.get("peak_bytes"))),
        ("when", str(plan.get("phase") or formats.MISSING), ""),
        ("error bar", f"± {bar}", ""),
        ("largest batch", formats.exact(plan.get("max_batch_size")), ""),
        ("matrix work a step", f"{formats.count(plan.get('flops_per_step'))} operations", ""),
        ("seconds a step", formats.duration(plan.get("seconds_per_step")), ""),
    ]
    return Facts(tuple(rows))


def _curve_section(plan: Document) -> Section | None:
    timeline: Sequence[Document] = plan.get("timeline") or ()
    if len(timeline) < 2:
        return None
    kinds = _shown_kinds(timeline)
    styles = tuple(charts.swatches(kinds).values())
    rows = [
        {"at": index, "moment": str(point["moment"]), "kind": kind, "bytes": held}
        for index, point in enumerate(timeline)
        for kind, held in _grouped(point["parts"], kinds).items()
    ]
    spec = charts.memory_chart(rows, styles, plan.get("capacity_bytes"), "Memory over the step")
    caption = "What is held at the highest moment of each stretch, in the order of time."
    figure = Figure("memory", "Memory over one step", spec, legend=styles)
    return Section(
        "timeline", "Timeline", "Timeline", (FigureGrid(caption, (figure,), (_moments(timeline),)),)
    )


def _shown_kinds(timeline: Sequence[Document]) -> list[str]:
    """The largest kinds, by their highest moment, then the rest."""
    most: dict[str, int] = {}
    for point in timeline:
        for kind, held in point["parts"].items():
            most[str(kind)] = max(most.get(str(kind), 0), held)
    ordered = sorted(most, key=lambda kind: -most[kind])
    return ordered if len(ordered) <= SHOWN_KINDS else [*ordered[: SHOWN_KINDS - 1], REST]


def _grouped(parts: Mapping[str, int], kinds: Sequence[str]) -> dict[str, int]:
    grouped = dict.fromkeys(kinds, 0)
    for kind, held in parts.items():
        grouped[kind if kind in grouped else REST] += held
    return grouped


def _moments(timeline: Sequence[Document]) -> Table:
    rows = tuple(
        (Cell(str(point["moment"])), size_cell(point["bytes"]), Cell(_largest(point["parts"])))
        for point in timeline
    )
    columns = (
        Column("stretch", numeric=False),
        Column("highest"),
        Column("most of it", numeric=False),
    )
    return Table("The highest moment of each stretch.", columns, rows, wide=False)


def _largest(parts: Mapping[str, int]) -> str:
    first = sorted(parts.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{kind} {formats.data_size(held)}" for kind, held in first)


def _parts_section(plan: Document) -> Section | None:
    parts: Mapping[str, int] = plan.get("parts") or {}
    if not parts:
        return None
    total = sum(parts.values())
    rows = tuple(
        (Cell(kind), size_cell(held), Cell(formats.percent(held / total)))
        for kind, held in parts.items()
    )
    columns = (Column("held for", numeric=False), Column("bytes"), Column("share"))
    table = Table(f"At the peak: {plan.get('phase')}.", columns, rows, wide=False)
    return Section("peak", "What holds the peak", "Peak", (table,))


def _lever_section(plan: Document) -> Section | None:
    rows = tuple(
        (
            Cell(str(lever["name"]), detail=" ".join(lever.get("settings") or ())),
            size_cell(lever["saves_bytes"]),
            Cell(str(lever["cost"])),
        )
        for lever in plan.get("levers") or ()
    )
    if not rows:
        return None
    columns = (Column("lever", numeric=False), Column("saves"), Column("cost", numeric=False))
    table = Table("Each lever pulled alone.", columns, rows)
    return Section("levers", "What would save memory", "Levers", (table,))


def _method_section(plan: Document) -> Section | None:
    rows = tuple(
        (
            Cell(str(row["method"])),
            count_cell(row.get("trainable_parameters")),
            size_cell(row.get("peak_bytes")),
            Cell("yes" if row.get("fits") else "no"),
            Cell(formats.exact(row.get("max_batch_size"))),
            Cell(formats.duration(row.get("seconds_per_step"))),
        )
        for row in plan.get("methods") or ()
    )
    if not rows:
        return None
    names = ("trained", "peak", "fits", "largest batch", "seconds a step")
    columns = (Column("method", numeric=False), *(Column(name) for name in names))
    table = Table("The same settings by every method.", columns, rows, wide=False)
    return Section("methods", "Methods side by side", "Methods", (table,))


def _serving_section(plan: Document) -> Section | None:
    if not plan.get("serving"):
        return None
    blocks: tuple[Block, ...] = (facts_table("Serving and storage", plan["serving"]),)
    return Section("serving", "Serving and storage", "Serving", blocks)
