"""Pieces both reports share: cells of figures with intervals, matrices, settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loralab.reports import formats
from loralab.reports.blocks import Cell, Column, Table

Interval = tuple[float | None, float | None, float | None]


def interval(value: Any) -> Interval:
    """(mean, low, high) of a figure: a mapping with these keys, a bare number, or nothing."""
    if isinstance(value, Mapping):
        middle = value.get("mean", value.get("value", value.get("difference")))
        return tuple(map(formats.finite, (middle, value.get("low"), value.get("high"))))  # type: ignore[return-value]
    return formats.finite(value), None, None


def table_of(
    caption: str,
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[tuple[Column, Callable[[Any], Cell]]],
    **options: Any,
) -> Table:
    """A row of cells for each row of figures; each column says how its cell is made of one.

    options: further fields of `Table`.
    """
    cells = tuple(tuple(cell_of(row) for _, cell_of in columns) for row in rows)
    return Table(caption, tuple(column for column, _ in columns), cells, **options)


def share_cell(value: Any, *, strong: bool = False) -> Cell:
    """A share with its interval, in per cent."""
    mean, low, high = interval(value)
    ends = [formats.number(None if end is None else 100 * end, 1) for end in (low, high)]
    return Cell(
        formats.percent(mean), detail=_detail(*ends), title=_exact(mean, low, high), strong=strong
    )


def figure_cell(value: Any, decimals: int = 3, *, strong: bool = False) -> Cell:
    """A figure with its interval."""
    mean, low, high = interval(value)
    ends = [formats.number(end, decimals) for end in (low, high)]
    return Cell(
        formats.number(mean, decimals),
        detail=_detail(*ends),
        title=_exact(mean, low, high),
        strong=strong,
    )


def count_cell(value: Any) -> Cell:
    """A count in three digits; the exact one on demand."""
    return Cell(formats.count(value), title=formats.exact(value))


def size_cell(num_bytes: Any) -> Cell:
    """A size in binary units; the exact bytes on demand."""
    exact = formats.exact(num_bytes)
    return Cell(
        formats.data_size(num_bytes), title="" if exact == formats.MISSING else f"{exact} bytes"
    )


def metric_cell(name: str, value: Any) -> Cell:
    """A metric by its name: losses and perplexities as figures, the rest as shares."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Cell(formats.exact(value))
    is_share = not any(word in name for word in ("nll", "loss", "perplexity", "seconds", "count"))
    return share_cell(value) if is_share else figure_cell(value, 4)


def confusion_table(
    matrix: Sequence[Sequence[int | float]], labels: Sequence[str], caption: str, **heading: Any
) -> Table:
    """Rows are true classes, columns predicted ones; shade and small figure are row shares."""
    names = [str(label) for label in labels] or [str(index) for index in range(len(matrix))]
    rows = []
    for name, row in zip(names, matrix, strict=False):
        total = sum(row)
        cells = [
            Cell(
                formats.number(cases, 0 if float(cases).is_integer() else 1),
                detail=formats.percent(cases / total if total else None),
                heat=round(10 * cases / total) if total else 0,
            )
            for cases in row
        ]
        rows.append((Cell(name), *cells))
    columns = (Column("true class", numeric=False), *(Column(name) for name in names))
    return Table(caption, columns, tuple(rows), wide=False, **heading)


def class_rows(per_class: Any, labels: Sequence[str]) -> list[tuple[Cell, ...]]:
    """A row a class: its name, precision, recall, F1 with intervals, and how many rows it has."""
    return [
        (
            Cell(str(row.get("name") or class_name(row.get("label", index), labels))),
            *(share_cell(row.get(key)) for key in ("precision", "recall", "f1")),
            Cell(formats.exact(row.get("support"))),
        )
        for index, row in enumerate(per_class or ())
    ]


CLASS_COLUMNS = (
    Column("class", numeric=False),
    Column("precision", "95 % interval"),
    Column("recall", "95 % interval"),
    Column("F1", "95 % interval"),
    Column("rows"),
)


def class_name(label: Any, labels: Sequence[str]) -> str:
    """A class by its name where it is given by its number."""
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return str(labels[label])
    return str(label)


def settings_tables(settings: Mapping[str, Any]) -> list[Table]:
    """One table a section of the settings, every key in it."""
    sections: dict[str, list[tuple[str, Any]]] = {}
    for dotted, value in formats.flatten(settings):
        section, _, key = dotted.rpartition(".") if "." in dotted else ("", "", dotted)
        sections.setdefault(section, []).append((key, value))
    columns = (Column("setting", numeric=False), Column("value", numeric=False))
    return [
        Table(
            "",
            columns,
            tuple((Cell(key), Cell(setting(f"{section}.{key}", value))) for key, value in rows),
            heading=f"[{section}]" if section else "general",
            wide=False,
        )
        for section, rows in sections.items()
    ]


def facts_table(heading: str, facts: Mapping[str, Any], *, counts: bool = False) -> Table:
    """Plain facts, units by the ends of their keys; `counts` writes them in three digits."""
    rows = tuple(
        (
            Cell(formats.words(key)),
            count_cell(value)
            if counts and not key.endswith("bytes")
            else Cell(formats.plain(value, key)),
        )
        for key, value in formats.flatten(facts, separator=" · ")
    )
    columns = (Column("figure", numeric=False), Column("value"))
    return Table("", columns, rows, heading=heading, wide=False)


def setting(key: str, value: Any) -> str:
    """A setting as a recipe writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting(key, item) for item in value) + "]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and "rate" in key:
        return formats.rate(value)
    return formats.plain(value)


def _detail(low: str, high: str) -> str:
    joined = formats.span(low, high)
    return "" if joined == formats.MISSING else joined


def _exact(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return ""
    ends = "" if low is None or high is None else f" [{low:.6g}, {high:.6g}]"
    return f"{mean:.6g}{ends}"
