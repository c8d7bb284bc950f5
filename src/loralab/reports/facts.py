"""The sections of plain facts: the data, and every setting with the machine and versions."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import formats
from loralab.reports.blocks import Block, Cell, Column, Facts, Section, Table, TableGrid
from loralab.reports.parts import facts_table, settings_tables

Row = Mapping[str, Any]


def data_section(report: Row) -> Section | None:
    """Where the rows come from, how they were split, what was left out, hashes."""
    data: Row = report.get("data") or {}
    blocks: list[Block] = []
    splits = {
        str(split): facts
        for split, facts in (data.get("splits") or {}).items()
        if isinstance(facts, Mapping)
    }
    if splits:
        blocks.append(_split_table(splits))
    left_out = [row for row in _rows(data.get("left_out")) if isinstance(row, Mapping)]
    if left_out:
        rows = tuple(
            (Cell(str(row.get("reason", ""))), Cell(formats.exact(row.get("rows"))))
            for row in left_out
        )
        columns = (Column("left out", numeric=False), Column("rows"))
        blocks.append(Table("", columns, rows, wide=False))
    shown = {"splits"} | ({"left_out"} if left_out else set())
    if splits:
        shown |= {
            "rows",
            "documents",
            "test_rows",
            "test_documents",
        }  # they stand in the table of splits
    rest = {
        key: value for key, value in data.items() if key not in shown and value not in (None, [])
    }
    if report.get("order_hash"):
        rest["order of batches"] = report["order_hash"]
    if rest:
        blocks.append(
            Facts(
                tuple(
                    (formats.words(key), formats.plain(value, key), "")
                    for key, value in formats.flatten(rest, separator=" · ")
                )
            )
        )
    return Section("data", "Data", "Data", tuple(blocks)) if blocks else None


def settings_section(report: Row) -> Section | None:
    """Every setting, section by section, with the machine and versions where known."""
    tables = settings_tables(report.get("settings") or {})
    tables += [
        facts_table(key, facts)
        for key in ("machine", "versions", "environment")
        if isinstance(facts := report.get(key), Mapping) and facts
    ]
    if not tables:
        return None
    grid = TableGrid(tuple(tables), packed=True)
    return Section("settings", "Every setting", "Settings", (grid,))


def _split_table(splits: Mapping[str, Row]) -> Table:
    classes = list(dict.fromkeys(name for f in splits.values() for name in f.get("classes") or ()))
    columns = (
        Column("split", numeric=False),
        Column("rows"),
        Column("of available"),
        Column("documents"),
        *(Column(str(name)) for name in classes),
        Column("SHA-256", numeric=False),
    )
    rows = tuple(
        (
            Cell(split),
            Cell(formats.exact(facts.get("rows"))),
            Cell(formats.exact(facts.get("available_rows"))),
            Cell(formats.exact(facts.get("documents"))),
            *(_class_cell(facts, name) for name in classes),
            Cell(str(facts.get("sha256") or "")[:16], title=str(facts.get("sha256") or "")),
        )
        for split, facts in splits.items()
    )
    return Table("", columns, rows)


def _class_cell(facts: Row, name: str) -> Cell:
    cases = formats.finite((facts.get("classes") or {}).get(name))
    total = formats.finite(facts.get("rows"))
    share = cases / total if total and cases is not None else None
    return Cell(formats.exact(cases), detail="" if share is None else formats.percent(share))


def _rows(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
