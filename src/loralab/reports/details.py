"""The sections below the charts: classes, seeds, economy, disagreements, data, settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import formats
from loralab.reports.blocks import (
    Block,
    Cell,
    Column,
    Facts,
    Prose,
    Quote,
    Quotes,
    Section,
    Swatch,
    Table,
    TableGrid,
)
from loralab.reports.parts import (
    confusion_table,
    figure_cell,
    metric_cell,
    per_class_rows,
    settings_tables,
    share_cell,
    support_cell,
)

Row = Mapping[str, Any]
Styles = Mapping[str, Swatch]


def class_section(methods: Sequence[Row], styles: Styles, comparison: Row) -> Section | None:
    """Confusion matrices and per-class figures."""
    blocks: list[Block] = []
    labels = _label_names(comparison)
    matrices = tuple(
        confusion_table(
            row["confusion_matrix"],
            labels or [name for name, _ in per_class_rows(row.get("per_class"))],
            "",
            heading=str(row["method"]),
            swatch=styles[str(row["method"])],
        )
        for row in methods
        if row.get("confusion_matrix")
    )
    if matrices:
        blocks.append(TableGrid(matrices))
    rows = tuple(
        (
            Cell(str(row["method"]), swatch=styles[str(row["method"])]),
            Cell(label),
            *(share_cell(figures.get(key)) for key in ("precision", "recall", "f1")),
            support_cell(figures),
        )
        for row in methods
        for label, figures in per_class_rows(row.get("per_class"))
    )
    if rows:
        columns = (
            Column("method", numeric=False),
            Column("class", numeric=False),
            Column("precision", "95 % interval"),
            Column("recall", "95 % interval"),
            Column("F1", "95 % interval"),
            Column("test rows"),
        )
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
    blocks: list[Block] = []
    per_seed = [(str(row["method"]), seed) for row in methods for seed in _seed_rows(row)]
    keys = _keys(seed for _, seed in per_seed)
    if any(key != "seed" for key in keys):
        columns = (
            Column("method", numeric=False),
            Column("seed"),
            *(Column(_TITLES.get(key, formats.words(key))) for key in keys if key != "seed"),
        )
        rows = tuple(
            (
                Cell(method, swatch=styles[method]),
                Cell(formats.plain(seed.get("seed"))),
                *(metric_cell(key, seed.get(key)) for key in keys if key != "seed"),
            )
            for method, seed in per_seed
        )
        blocks.append(Table("Each seed's run on the same test rows.", columns, rows))
    if mcnemar := comparison.get("mcnemar"):
        blocks.append(_mcnemar_table(mcnemar))
    return Section("seeds", "Seed by seed", "Seeds", tuple(blocks)) if blocks else None


def economy_section(methods: Sequence[Row], styles: Styles, comparison: Row) -> Section | None:
    """The storage sum, and "parameter efficiency" with why it decides nothing."""
    blocks: list[Block] = []
    if storage := comparison.get("storage"):
        blocks += _plain_blocks(storage, styles, "Storage for many tasks")
    if efficiency := comparison.get("parameter_efficiency"):
        blocks += _plain_blocks(efficiency, styles, "“Parameter efficiency”")
        blocks.append(
            Prose(
                "Accuracy divided by millions of trainable parameters is shown because it is often "
                "quoted, not because it means anything. A division by a number that spans orders "
                "of magnitude ranks methods by that number alone: whichever trains fewest "
                "parameters comes first, even if it learned nothing and only guesses. Trained "
                "parameters are also no cost anyone pays; memory, time and bytes on disk are, and "
                "they stand in the tables above."
            )
        )
    if not blocks:
        return None
    return Section("economy", "Storage and parameter efficiency", "Economy", tuple(blocks))


def disagreement_section(comparison: Row, styles: Styles) -> Section | None:
    """Test rows on which the methods differ, with their texts."""
    quotes = tuple(_quote(row, styles) for row in comparison.get("disagreements") or ())
    if not quotes:
        return None
    lead = "A few test rows on which the methods do not agree. They are chosen because they "
    lead += "differ, so they say nothing about how often each method is right."
    return Section(
        "disagreements",
        "Where the methods disagree",
        "Disagreements",
        (Quotes(quotes),),
        lead,
    )


def data_section(report: Row) -> Section | None:
    """Facts of the data: rows, documents, labels, lengths, hashes."""
    facts = _facts(report.get("data") or {})
    return Section("data", "Data", "Data", (facts,)) if facts.rows else None


def settings_section(report: Row) -> Section | None:
    """Every setting, section by section, with the machine and versions where known."""
    tables = settings_tables(report.get("settings") or {})
    for key in ("steps", "machine", "versions", "environment"):
        if isinstance(known := report.get(key), Mapping) and known:
            rows = tuple(
                (Cell(name), Cell(formats.plain(value, name)))
                for name, value in formats.flatten(known)
            )
            columns = (Column("", numeric=False), Column("", numeric=False))
            tables.append(Table("", columns, rows, heading=key, wide=False))
    if not tables:
        return None
    return Section("settings", "Every setting", "Settings", (TableGrid(tuple(tables)),))


_TITLES = {
    "nll": "neg. log-likelihood",
    "macro_f1": "macro F1",
    "validation_nll": "validation loss",
    "validation_accuracy": "validation accuracy",
    "p": "p",
}


def _label_names(report: Row) -> list[str]:
    data = report.get("data") or {}
    names = report.get("label_names") or data.get("label_names") or data.get("labels") or ()
    return [str(name) for name in names]


def _seed_rows(row: Row) -> list[Row]:
    """The rows of `per_seed`, or of `seeds` where these hold more than numbers."""
    per_seed = row.get("per_seed") or row.get("seeds") or ()
    if isinstance(per_seed, Mapping):
        return [{"seed": seed, **figures} for seed, figures in per_seed.items()]
    return [seed for seed in per_seed if isinstance(seed, Mapping)]


def _keys(rows: Any) -> list[str]:
    """Keys of all rows in the order they first appear, without nested tables."""
    keys: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if not isinstance(value, list | dict) or _is_interval(value):
                keys.setdefault(str(key))
    return list(keys)


def _is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and ("mean" in value or "value" in value)


def _mcnemar_table(mcnemar: Any) -> Table:
    rows = [row for row in _as_rows(mcnemar) if isinstance(row, Mapping)]
    flat = []
    for row in rows:
        inner = row.get("seeds") or row.get("per_seed")
        outer = {key: value for key, value in row.items() if key not in ("seeds", "per_seed")}
        if isinstance(inner, list) and inner and isinstance(inner[0], Mapping):
            flat += [{**outer, **seed} for seed in inner]
        else:
            flat.append(outer)
    keys = [key for key in _keys(flat) if key not in ("a", "b", "seed")]
    columns = (
        Column("pair", numeric=False),
        Column("seed"),
        *(Column(_TITLES.get(key, formats.words(key))) for key in keys),
    )
    cells = tuple(
        (
            Cell(f"{row.get('a')} − {row.get('b')}"),
            Cell(formats.plain(row.get("seed"))),
            *(
                Cell(
                    formats.p_value(row.get(key)) if key in _P_KEYS else formats.plain(row.get(key))
                )
                for key in keys
            ),
        )
        for row in flat
    )
    return Table(
        "McNemar's exact test on the rows that only one of the two methods has right.",
        columns,
        cells,
        note="It knows one run a method, so it is shown seed by seed and never pooled: pooled over "
        "seeds that differ it names winners that are none.",
        heading="McNemar's test, seed by seed",
    )


_P_KEYS = ("p", "p_value")


def _as_rows(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, Mapping) else value


def _plain_blocks(value: Any, styles: Styles, heading: str) -> list[Block]:
    """Plain data under a heading: rows as a table, a mapping of rows by method, sentences."""
    if isinstance(value, str):
        return [Prose(value)]
    if isinstance(value, Mapping):
        scalars = {k: v for k, v in value.items() if not isinstance(v, Mapping | list | tuple)}
        rows = [{"method": k, **v} for k, v in value.items() if isinstance(v, Mapping)]
        rows += [row for v in value.values() if isinstance(v, list | tuple) for row in v]
        if not rows and scalars and all(key in styles for key in scalars):
            rows, scalars = [{"method": k, heading.strip("“”"): v} for k, v in scalars.items()], {}
        sentences = [text for text in scalars.values() if isinstance(text, str) and " " in text]
        facts = {k: v for k, v in scalars.items() if v not in sentences}
        blocks: list[Block] = [_row_table(rows, styles, heading)] if rows else []
        if facts:
            blocks.append(_facts(facts))
        return blocks + [Prose(text) for text in sentences]
    return [_row_table(value, styles, heading)] if value else []


def _row_table(rows: Sequence[Any], styles: Styles, heading: str) -> Table:
    rows = [row for row in rows if isinstance(row, Mapping)]
    keys = _keys(rows)
    keys.sort(key=lambda key: key != "method")
    columns = tuple(
        Column(formats.words(key.removesuffix("_bytes")), numeric=key != "method") for key in keys
    )
    cells = tuple(tuple(_plain_cell(key, row.get(key), styles) for key in keys) for row in rows)
    return Table("", columns, cells, heading=heading)


def _plain_cell(key: str, value: Any, styles: Styles) -> Cell:
    if key == "method":
        return Cell(str(value), swatch=styles.get(str(value)))
    if _is_interval(value):
        return figure_cell(value)
    if "parameters" in key and isinstance(value, int):
        return Cell(formats.count(value), title=formats.exact(value))
    if isinstance(value, float) and not key.endswith(("bytes", "seconds")):
        return Cell(f"{value:.4g}" if abs(value) < 1e4 else formats.exact(value))
    return Cell(formats.plain(value, key))


def _facts(tables: Row) -> Facts:
    return Facts(
        tuple(
            (formats.words(key).replace(".", " · "), formats.plain(value, key), "")
            for key, value in formats.flatten(tables)
        )
    )


def _quote(row: Row, styles: Styles) -> Quote:
    label = row.get("label_name", row.get("label"))
    source = [f"true class: {formats.plain(label)}" if label is not None else ""]
    source += [f"{key} {row[key]}" for key in ("id", "group") if row.get(key) is not None]
    said = row.get("predictions") or row.get("methods") or {}
    pairs = said.items() if isinstance(said, Mapping) else ((p.get("method"), p) for p in said)
    rows = tuple(
        (Cell(str(method), swatch=styles.get(str(method))), _said(answer))
        for method, answer in pairs
    )
    return Quote(str(row.get("text", "")), " · ".join(filter(None, source)), rows)


def _said(answer: Any) -> str:
    """What a method said of a row: a class, a list of one a seed, or a mapping with both."""
    if not isinstance(answer, Mapping):
        return formats.plain(answer)
    said = answer.get("prediction_name", answer.get("prediction", answer.get("predictions")))
    parts = [] if said is None else [formats.plain(said)]
    if (correct := answer.get("correct")) is not None:
        parts.append(
            ("right" if correct else "wrong") if isinstance(correct, bool) else str(correct)
        )
    for key in ("probability", "nll", "right", "of"):
        if (value := formats.finite(answer.get(key))) is not None:
            text = formats.percent(value, 0) if key == "probability" else formats.plain(value)
            parts.append(text if key == "probability" else f"{key} {text}")
    return ", ".join(parts)
