"""One training run -> a page: its figures, curves, findings, settings, and how to use it next."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import charts, formats, series
from loralab.reports.blocks import (
    Block,
    Cell,
    Column,
    Commands,
    Facts,
    Figure,
    FigureGrid,
    Note,
    Notes,
    Page,
    Section,
    Swatch,
    Table,
    TableGrid,
)
from loralab.reports.facts import data_section, settings_section
from loralab.reports.parts import (
    CLASS_COLUMNS,
    class_rows,
    confusion_table,
    facts_table,
    interval,
    metric_cell,
)

Row = Mapping[str, Any]


def run_page(run: Row) -> Page:
    """The page of a run; parts the run lacks are left out."""
    sections = [
        _result_section(run),
        _curve_section(run),
        _class_section(run),
        finding_section(run),
        cost_section(run),
        command_section(run),
        file_section(run),
        data_section(run),
        settings_section(run),
    ]
    method, model, data = (str(part) for part in _subject(run))
    return Page(
        title=f"{method} on {data}",
        kicker=f"Training run · {run['run']}" if run.get("run") else "Training run",
        headline=_headline(run, method, model, data),
        status=str(run.get("summary") or ""),
        facts=headline_facts(run),
        sections=tuple(section for section in sections if section is not None),
        footer=" · ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items()),
    )


def _subject(run: Row) -> tuple[Any, Any, Any]:
    settings = run.get("settings") or {}
    data_settings, data_facts = settings.get("data") or {}, run.get("data") or {}
    return (
        run.get("method") or (settings.get("method") or {}).get("kind") or "a run",
        run.get("model") or (settings.get("model") or {}).get("name") or "a model",
        data_facts.get("name")
        or data_settings.get("name")
        or data_settings.get("train")
        or "its data",
    )


def _headline(run: Row, method: str, model: str, data: str) -> str:
    """One sentence: what was trained on what, and the figure that says how well."""
    done = f"{model}, fine-tuned by {method} on {data}"
    evaluations = _evaluations(run)
    if not evaluations:
        return f"{done}; not evaluated yet"
    split = "test" if "test" in evaluations else next(iter(evaluations))
    metrics = evaluations[split]["metrics"]
    name = "accuracy" if "accuracy" in metrics else next(iter(metrics), None)
    if name is None:
        return done
    cell = metric_cell(name, metrics[name])
    within = f" (95 % interval {cell.detail})" if cell.detail else ""
    return f"{done}: {formats.words(name)} {cell.text}{within} on the {split} rows"


def _evaluations(run: Row) -> dict[str, dict[str, Any]]:
    """Split -> {rows, metrics}; a mapping of bare metrics counts as metrics of its split."""
    evaluations: dict[str, dict[str, Any]] = {}
    for split, evaluation in (run.get("evaluation") or {}).items():
        if isinstance(evaluation, Mapping):
            inner = evaluation.get("metrics")
            whole = dict(evaluation) if isinstance(inner, Mapping) else {"metrics": evaluation}
            evaluations[str(split)] = whole
    return evaluations


def headline_facts(run: Row) -> Facts:
    """The few figures below the headline."""
    parameters = run.get("parameters") or {}
    trainable = parameters.get("trainable", run.get("trainable_parameters"))
    total = parameters.get("total", run.get("total_parameters"))
    rows = []
    if formats.finite(trainable) is not None:
        rows.append(("trainable", formats.count(trainable), formats.exact(trainable)))
    if formats.finite(total) is not None:
        rows.append(("parameters", formats.count(total), formats.exact(total)))
    for term, key in (("steps", "steps"), ("seed", "seed")):
        if isinstance(run.get(key), int):
            rows.append((term, formats.exact(run[key]), ""))
    if (seconds := formats.finite((run.get("timing") or {}).get("total_seconds"))) is not None:
        rows.append(("training time", formats.duration(seconds), ""))
    return Facts(tuple(rows))


def _result_section(run: Row) -> Section | None:
    evaluations = _evaluations(run)
    names: dict[str, None] = {}
    for evaluation in evaluations.values():
        for name, value in evaluation["metrics"].items():
            if not isinstance(value, int) and interval(value)[0] is not None:
                names.setdefault(name, None)
    if not names:
        return None
    columns = (
        Column("split", numeric=False),
        Column("rows"),
        *(Column(formats.words(name), "95 % interval") for name in names),
    )
    rows = tuple(
        (
            Cell(split),
            Cell(formats.exact(evaluation.get("rows"))),
            *(metric_cell(name, evaluation["metrics"].get(name)) for name in names),
        )
        for split, evaluation in evaluations.items()
    )
    table = Table("Figures of the restored best checkpoint.", columns, rows, wide=False)
    return Section("results", "Results", "Results", (table,))


def _curve_section(run: Row) -> Section | None:
    train, validation = run.get("train") or (), run.get("validation") or ()
    rates = run.get("learning_rates") or {}
    style = charts.swatches([method := str(_subject(run)[0])])[method]
    figures, tables, captions = [], [], []
    if train or validation:
        spec, table, caption = _loss_figure(train, validation, style, run.get("best_step"))
        figures.append(Figure("loss", "Loss", spec))
        tables.append(table)
        captions.append(caption)
    if rates:
        legend = tuple(charts.swatches(rates).values())
        spec, table = schedule_figure(rates, legend)
        figures.append(Figure("schedule", "Learning rate", spec, legend=legend))
        tables.append(table)
        captions.append("Learning rate of each group of parameters.")
    if not figures:
        return None
    grid = FigureGrid(" ".join(captions), tuple(figures), tuple(tables))
    return Section("curves", "Training", "Training", (grid,))


def _loss_figure(
    train: Sequence[Any], validation: Sequence[Any], style: Swatch, best_step: Any
) -> tuple[charts.Spec, Table, str]:
    span = series.smoothing_span(len(train))
    smoothed = [
        {"run": style.label, "step": step, "loss": round(loss, 5)}
        for step, loss in series.smooth(train, span)
    ]
    scored = [
        {"run": style.label, "step": step, "loss": loss}
        for step, loss, *_ in validation
        if formats.finite(loss) is not None
    ]
    domain = series.padded_range(row["loss"] for row in smoothed + scored)
    description = "Training and validation loss against the step"
    spec = charts.loss_chart(smoothed, scored, style, domain, description)
    averaged = f", averaged over about {span} points" if span > 1 else ""
    caption = f"Thin line: training loss{averaged}. Thick line with points: validation loss."
    last = formats.number(smoothed[-1]["loss"] if smoothed else None, 4)
    return spec, _validation_table(validation, best_step, last), caption


def schedule_figure(
    rates: Mapping[str, Sequence[Any]], styles: Sequence[Swatch]
) -> tuple[charts.Spec, Table]:
    """Learning rates by group of parameters: a chart and its table."""
    rows = [
        {"group": group, "step": step, "rate": rate}
        for group, line in rates.items()
        for step, rate in series.thin(line)
    ]
    spec = charts.schedule_chart(rows, styles, "Learning rate against the step")
    table = Table(
        "Learning rates of each group of parameters.",
        (Column("parameters", numeric=False), Column("highest"), Column("last")),
        tuple(
            (
                Cell(group),
                Cell(formats.rate(max((rate for _, rate in line), default=None))),
                Cell(formats.rate(line[-1][1] if line else None)),
            )
            for group, line in rates.items()
        ),
        wide=False,
    )
    return spec, table


def _validation_table(validation: Sequence[Sequence[Any]], best: Any, last_train: str) -> Table:
    has_accuracy = any(len(row) > 2 for row in validation)
    columns = [Column("step"), Column("validation loss")]
    columns += [Column("accuracy")] if has_accuracy else []
    rows = tuple(
        (
            Cell(formats.exact(row[0]), strong=row[0] == best),
            Cell(formats.number(row[1], 4), detail="best" if row[0] == best else ""),
            *([Cell(formats.percent(row[2] if len(row) > 2 else None))] if has_accuracy else []),
        )
        for row in validation
    )
    note = f"Training loss at the end, averaged: {last_train}."
    return Table("Loss on the validation rows.", tuple(columns), rows, note=note, wide=False)


def _class_section(run: Row) -> Section | None:
    matrix, labels = run.get("confusion_matrix"), run.get("label_names") or ()
    blocks: list[Block] = []
    lead = ""
    if matrix:
        lead = "Rows are the true classes, columns the predicted ones; the small figure and the "
        lead += "shade are the share of the true class."
        blocks.append(confusion_table(matrix, labels, ""))
    rows = class_rows(run.get("per_class"), labels)
    if rows:
        blocks.append(Table("Figures of each class.", CLASS_COLUMNS, tuple(rows), wide=False))
    return Section("classes", "Classes", "Classes", tuple(blocks), lead) if blocks else None


def finding_section(run: Row) -> Section | None:
    """What the doctor found."""
    if run.get("findings") is None:
        return None
    notes = tuple(
        Note(
            level=str(finding.get("level", "info")),
            title=formats.words(str(finding.get("name", ""))).replace("-", " "),
            text=str(finding.get("message", "")),
            next_step=str(finding.get("next_step") or ""),
        )
        for finding in run["findings"]
    )
    notes = notes or (Note("ok", "no findings", "The doctor looked and found nothing wrong."),)
    return Section("findings", "The doctor's findings", "Findings", (Notes(notes),))


def cost_section(run: Row) -> Section | None:
    """Parameters, time, memory."""
    tables = [
        facts_table(heading, run[key], counts=key == "parameters")
        for key, heading in (("parameters", "Parameters"), ("timing", "Time and memory"))
        if run.get(key)
    ]
    if not tables:
        return None
    return Section("cost", "Cost", "Cost", (TableGrid(tuple(tables)),))


def command_section(run: Row) -> Section | None:
    """What to do with the run."""
    rows = tuple((str(row["purpose"]), str(row["command"])) for row in run.get("commands") or ())
    if not rows:
        return None
    return Section("next", "What to do with it", "Next", (Commands(rows),))


def file_section(run: Row) -> Section | None:
    """What lies in its folder."""
    rows = tuple(
        (
            Cell(str(row["path"])),
            Cell(formats.data_size(row.get("bytes"))),
            Cell(str(row.get("purpose") or "")),
        )
        for row in run.get("files") or ()
    )
    if not rows:
        return None
    columns = (Column("file", numeric=False), Column("size"), Column("holds", numeric=False))
    return Section("files", "Files", "Files", (Table("", columns, rows, wide=False),))
