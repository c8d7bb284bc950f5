"""The sections below the charts: classes, seeds, storage and efficiency, disagreements."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import formats
from loralab.reports.blocks import (
    Block,
    Cell,
    Column,
    Quote,
    Quotes,
    Section,
    Swatch,
    Table,
    TableGrid,
)
from loralab.reports.parts import (
    CLASS_COLUMNS,
    class_rows,
    confusion_table,
    metric_cell,
    size_cell,
)

Row = Mapping[str, Any]
Styles = Mapping[str, Swatch]


def class_section(methods: Sequence[Row], styles: Styles, comparison: Row) -> Section | None:
    """Confusion matrices and per-class figures."""
    blocks: list[Block] = []
    labels = _label_names(comparison)
    matrices = tuple(
        confusion_table(row["confusion_matrix"], labels, "", heading=name, swatch=styles[name])
        for row in methods
        if row.get("confusion_matrix") and (name := str(row["method"]))
    )
    if matrices:
        blocks.append(TableGrid(matrices))
    rows = tuple(
        (Cell(name := str(row["method"]), swatch=styles[name]), *cells)
        for row in methods
        for cells in class_rows(row.get("per_class"), labels)
    )
    if rows:
        columns = (Column("method", numeric=False), *CLASS_COLUMNS)
        blocks.append(Table("Figures of each class.", columns, rows, heading="By class"))
    if not blocks:
        return None
    lead = ""
    if matrices:
        lead = "Rows are the true classes, columns the predicted ones, over all seeds. The small "
        lead += "figure and the shade are the share of the true class."
    return Section("classes", "Confusion matrices and classes", "Classes", tuple(blocks), lead)


def seed_section(methods: Sequence[Row], styles: Styles, comparison: Row) -> Section | None:
    """Every seed's figures, and McNemar's test seed by seed."""
    tables: list[Table] = []
    runs = [(str(row["method"]), run) for row in methods for run in row.get("per_seed") or ()]
    keys = _figure_keys(run for _, run in runs)
    if keys:
        columns = (
            Column("method", numeric=False),
            Column("seed"),
            *(Column(formats.words(key)) for key in keys),
        )
        rows = tuple(
            (
                Cell(method, swatch=styles[method]),
                Cell(formats.plain(run.get("seed"))),
                *(metric_cell(key, run.get(key)) for key in keys),
            )
            for method, run in runs
        )
        caption = "Each seed's run on the same test rows."
        tables.append(Table(caption, columns, rows, heading="Figures", wide=False))
    if mcnemar := comparison.get("mcnemar"):
        tables.append(_mcnemar_table(mcnemar))
    if not tables:
        return None
    return Section("seeds", "Seed by seed", "Seeds", (TableGrid(tuple(tables)),))


def economy_section(methods: Sequence[Row], styles: Styles, comparison: Row) -> Section | None:
    """The storage sum, and "parameter efficiency" with why it decides nothing."""
    tables: list[Table] = []
    if storage := comparison.get("storage"):
        tables.append(_storage_table(storage, styles))
    if efficiency := comparison.get("parameter_efficiency"):
        tables.append(_efficiency_table(efficiency, methods, styles))
    if not tables:
        return None
    title = "Storage, and “parameter efficiency”"
    return Section("economy", title, "Economy", (TableGrid(tuple(tables)),))


def disagreement_section(comparison: Row, styles: Styles) -> Section | None:
    """Test rows on which the methods differ, with their texts."""
    quotes = tuple(_quote(row, styles) for row in comparison.get("disagreements") or ())
    if not quotes:
        return None
    lead = "Test rows on which the methods differ most. They are chosen because they differ, so "
    lead += "they say nothing about how often each method is right. A prediction is what most of "
    lead += "a method's seeds say; its loss is the mean over them."
    title = "Where the methods disagree"
    return Section("disagreements", title, "Disagreements", (Quotes(quotes),), lead)


def _label_names(comparison: Row) -> list[str]:
    return [str(name) for name in (comparison.get("data") or {}).get("label_names") or ()]


def _figure_keys(runs: Any) -> list[str]:
    """The keys of all runs that hold one figure, in the order they first appear."""
    keys: dict[str, None] = {}
    for run in runs:
        for key, value in run.items():
            if key != "seed" and (value is None or isinstance(value, int | float)):
                keys.setdefault(str(key))
    return list(keys)


def _mcnemar_table(tests: Sequence[Row]) -> Table:
    columns = (
        Column("pair", numeric=False),
        Column("seed"),
        Column("only first right"),
        Column("only second right"),
        Column("p, exact"),
        Column("p, mid"),
    )
    rows = tuple(
        (
            Cell(f"{test.get('a')} − {test.get('b')}"),
            Cell(formats.plain(test.get("seed"))),
            Cell(formats.exact(test.get("only_a"))),
            Cell(formats.exact(test.get("only_b"))),
            Cell(formats.p_value(test.get("p"))),
            Cell(formats.p_value(test.get("p_mid"))),
        )
        for test in tests
    )
    return Table(
        "The rows that only one of the two methods has right.",
        columns,
        rows,
        note="This test knows one run of each method. It is shown seed by seed and is no part of "
        "the verdict: pooled over seeds that differ, it names winners where there are none.",
        heading="McNemar's test",
        wide=False,
    )


def _storage_table(storage: Row, styles: Styles) -> Table:
    tasks, base = storage.get("tasks"), storage.get("base_bytes")
    rows = tuple(
        (
            Cell(name := str(row["method"]), swatch=styles.get(name)),
            Cell(_storage_sum(row, tasks)),
            size_cell(row.get("artifact_bytes")),
            size_cell(row.get("total_bytes")),
        )
        for row in storage.get("rows") or ()
    )
    columns = (
        Column("method", numeric=False),
        Column("stored", numeric=False),
        Column("one task"),
        Column(f"{formats.plain(tasks)} tasks"),
    )
    note = ""
    if formats.finite(base) is not None:
        note = f"The base model takes {formats.data_size(base)}; {formats.plain(tasks)} whole "
        note += f"models of it would take {formats.data_size(storage.get('full_models_bytes'))}."
    heading = f"Storage for {formats.plain(tasks)} tasks"
    return Table("", columns, rows, note=note, heading=heading, wide=False)


def _storage_sum(row: Row, tasks: Any) -> str:
    count = formats.plain(tasks)
    return f"base + {count} × small part" if row.get("needs_base") else f"{count} × whole model"


def _efficiency_table(efficiency: Row, methods: Sequence[Row], styles: Styles) -> Table:
    trainable = {str(row["method"]): row.get("trainable_parameters") for row in methods}
    entries = [
        (
            Cell(name := str(row["method"]), swatch=styles.get(name)),
            trainable.get(name),
            row.get("accuracy_per_million_parameters"),
        )
        for row in efficiency.get("rows") or ()
    ]
    entries.append((Cell("a coin flip with one parameter"), 1, 0.5 * 1e6))
    rows = tuple(
        (
            name,
            Cell(formats.count(parameters), title=formats.exact(parameters)),
            Cell(_four_digits(value)),
        )
        for name, parameters, value in entries
    )
    columns = (
        Column("method", numeric=False),
        Column("trainable parameters"),
        Column("accuracy per million"),
    )
    heading = "“Parameter efficiency”, and why it ranks nothing"
    note = str(efficiency.get("refutation") or "")
    return Table("", columns, rows, note=note, heading=heading, wide=False)


def _four_digits(value: Any) -> str:
    figure = formats.finite(value)
    if figure is None:
        return formats.MISSING
    return formats.number(figure, 0 if abs(figure) >= 1000 else 2 if abs(figure) >= 1 else 4)


def _quote(row: Row, styles: Styles) -> Quote:
    label = row.get("label_name") or row.get("label")
    source = [f"true class: {formats.plain(label)}"] if label is not None else []
    source += [str(row["id"])] if row.get("id") is not None else []
    said = tuple(
        (Cell(str(method), swatch=styles.get(str(method))), _said(answer))
        for method, answer in (row.get("predictions") or {}).items()
    )
    return Quote(str(row.get("text") or ""), " · ".join(source), said)


def _said(answer: Row) -> str:
    """What a method said of a row, whether it is right, and its loss."""
    name = formats.plain(answer.get("prediction_name", answer.get("prediction")))
    parts = [name]
    if name not in ("exact match", "no match"):  # a causal task's answers say it themselves
        parts.append("right" if answer.get("correct") else "wrong")
    if formats.finite(loss := answer.get("nll")) is not None:
        parts.append(f"loss {formats.number(loss, 2)}")
    return ", ".join(parts)
