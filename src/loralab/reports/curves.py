"""The sections of a comparison that are charts: learning rates, losses, cost against quality."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loralab.reports import charts, formats, series
from loralab.reports.blocks import Cell, Column, Figure, FigureGrid, Section, Swatch, Table
from loralab.reports.cost_chart import CostKind, cost_chart
from loralab.reports.parts import interval, share_cell

Row = Mapping[str, Any]
Styles = Mapping[str, Swatch]

_COSTS: tuple[tuple[str, str, CostKind, Callable[[Any], str]], ...] = (
    ("trainable_parameters", "trainable parameters", "count", formats.count),
    ("peak_bytes", "peak memory", "bytes", formats.data_size),
    ("step_seconds", "time of a step", "seconds", formats.duration),
    ("artifact_bytes", "size on disk", "bytes", formats.data_size),
)


def learning_rate_section(methods: Sequence[Row], styles: Styles, settings: Row) -> Section | None:
    """Validation loss against learning rate, a panel a method."""
    compare = settings.get("compare") or {}
    grids = compare.get("learning_rates") or {}
    swept = {str(row["method"]): _rate_points(row, grids) for row in methods}
    swept = {method: points for method, points in swept.items() if points}
    if not swept:
        return None
    domain = series.padded_range(p["loss"] for points in swept.values() for p in points)
    figures = tuple(
        Figure(
            f"rates-{index}",
            method,
            charts.learning_rate_chart(
                [p for p in points if p["loss"] is not None],
                styles[method],
                domain,
                f"Validation loss of {method} against learning rate",
            ),
            styles[method],
        )
        for index, (method, points) in enumerate(swept.items())
    )
    table = Table(
        "Every learning rate tried, with its loss and accuracy on the validation rows.",
        (
            Column("method", numeric=False),
            Column("learning rate"),
            Column("validation loss"),
            Column("accuracy"),
            Column("", numeric=False),
        ),
        tuple(
            (
                Cell(method, swatch=styles[method]),
                Cell(formats.rate(p["rate"]), strong=p["best"]),
                Cell("diverged" if p["loss"] is None else formats.number(p["loss"], 4)),
                Cell(formats.percent(p["accuracy"])),
                Cell(", ".join(_rate_remarks(p))),
            )
            for method, points in swept.items()
            for p in points
        ),
        wide=False,
    )
    caption = "The ring marks the best rate of each method. All panels share the loss axis."
    if any(p["extended"] for points in swept.values() for p in points):
        caption += " Hollow points were added because the best lay on an edge of the grid."
    grid = FigureGrid(
        caption,
        figures,
        (table,),
    )
    lead = "Each method was given its own grid of learning rates, and the best was chosen on the "
    lead += "validation rows, never on the test rows."
    reasons = [str(row["open_end"]) for row in methods if row.get("open_end")]
    if reasons:
        lead += f" No winner can be named, because {'; '.join(reasons)}."
    return Section("rates", "Learning rates", "Learning rates", (grid,), lead)


def loss_section(
    methods: Sequence[Row], styles: Styles, loss_curves: Mapping[str, Sequence[Row]]
) -> Section | None:
    """Training and validation loss at each method's best rate, a panel a method."""
    chosen = {}
    for row in methods:
        method = str(row["method"])
        runs = loss_curves.get(method) or ()
        at_best = [r for r in runs if _same(r.get("learning_rate"), row.get("best_learning_rate"))]
        if at_best or runs:
            chosen[method] = at_best or list(runs)
    if not chosen:
        return None
    lines = {method: [_run_lines(run) for run in runs] for method, runs in chosen.items()}
    every = [row["loss"] for runs in lines.values() for part in runs for row in part[0] + part[1]]
    domain = series.padded_range(every)
    figures = tuple(
        Figure(
            f"loss-{index}",
            method,
            charts.loss_chart(
                [row for train, _ in runs for row in train],
                [row for _, validation in runs for row in validation],
                styles[method],
                domain,
                f"Training and validation loss of {method} against the step",
            ),
            styles[method],
        )
        for index, (method, runs) in enumerate(lines.items())
    )
    rows = tuple(
        _loss_row(styles[method], run, *parts)
        for method, runs in chosen.items()
        for run, parts in zip(runs, lines[method], strict=True)
    )
    table = Table(
        "Loss of every run drawn above.",
        (
            Column("method", numeric=False),
            Column("seed"),
            Column("learning rate"),
            Column("steps"),
            Column("training loss, last", "smoothed"),
            Column("validation loss, first"),
            Column("validation loss, least"),
            Column("at step"),
            Column("validation loss, last"),
        ),
        rows,
    )
    spans = {
        series.smoothing_span(len(run.get("train") or ())) for r in chosen.values() for run in r
    }
    average = (
        f"an exponential average over about {max(spans)} points" if max(spans) > 1 else "as is"
    )
    grid = FigureGrid(
        f"Thin lines: training loss ({average}), one a seed. Thick lines with points: validation "
        "loss. All panels share the loss axis.",
        figures,
        (table,),
    )
    return Section("losses", "Loss during training", "Losses", (grid,))


def cost_section(methods: Sequence[Row], styles: Styles) -> Section | None:
    """Accuracy and log-likelihood against four costs."""
    qualities = (
        ("accuracy", "accuracy", ".1~%", lambda v: share_cell(v).text, "higher is better"),
        ("nll", "neg. log-likelihood", ".3~f", lambda v: formats.number(v, 3), "lower is better"),
    )
    costs = [cost for cost in _COSTS if any(formats.finite(row.get(cost[0])) for row in methods)]
    grids = []
    for key, title, axis_format, write, direction in qualities:
        measured = [row for row in methods if interval(row.get(key))[0] is not None]
        if not measured or not costs:
            continue
        names = [str(row["method"]) for row in measured]
        figures = tuple(
            Figure(
                f"cost-{key}-{cost}",
                "",
                cost_chart(
                    _cost_points(measured, cost, key, write_cost, write),
                    [styles[name] for name in names],
                    cost_title=cost_title,
                    cost_kind=kind,
                    quality_title=title,
                    quality_format=axis_format,
                    description=f"{title} against {cost_title}",
                ),
            )
            for cost, cost_title, kind, write_cost in costs
        )
        grids.append(
            FigureGrid(
                f"{title[0].upper()}{title[1:]} on the test rows with its 95 % interval, against "
                f"four costs: {direction}, further left is cheaper.",
                figures,
                (_cost_table(measured, key, title, costs, styles, write),),
                legend=tuple(styles[name] for name in names) if not grids else (),
            )
        )
    if not grids:
        return None
    return Section("cost", "Cost against quality", "Cost", tuple(grids))


def _rate_points(row: Row, grids: Row) -> list[dict[str, Any]]:
    grid = grids.get(str(row["method"]))
    return [
        {
            "rate": point["learning_rate"],
            "loss": formats.finite(point.get("validation_nll", point.get("validation_loss"))),
            "accuracy": formats.finite(point.get("validation_accuracy")),
            "best": _same(point["learning_rate"], row.get("best_learning_rate")),
            "extended": bool(point.get("extended", _is_added(point["learning_rate"], grid))),
        }
        for point in row.get("learning_rates") or ()
    ]


def _is_added(rate: int | float, grid: Sequence[int | float] | None) -> bool:
    """Whether a rate is none of the grid the settings give, where they give one."""
    return bool(grid) and not any(_same(rate, given) for given in grid or ())


def _same(one: Any, other: Any) -> bool:
    """Whether two rates are one: a grid extended by its own ratio has rounding in its last bits."""
    return None not in (one, other) and math.isclose(one, other, rel_tol=1e-6)


def _rate_remarks(point: Row) -> list[str]:
    remarks = {"best": "best", "extended": "added to the grid"}
    return [remark for key, remark in remarks.items() if point[key]]


def _run_lines(run: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    name = str(run.get("run") or f"seed {run.get('seed')}")
    train = run.get("train") or ()
    smoothed = series.smooth(train, series.smoothing_span(len(train)))
    validation = [
        (int(step), loss)
        for step, loss in run.get("validation") or ()
        if formats.finite(loss) is not None
    ]
    return (
        [{"run": name, "step": step, "loss": round(loss, 5)} for step, loss in smoothed],
        [
            {"run": name, "step": step, "loss": round(loss, 5)}
            for step, loss in series.thin(validation)
        ],
    )


def _loss_row(
    swatch: Swatch, run: Row, train: Sequence[Row], validation: Sequence[Row]
) -> tuple[Cell, ...]:
    least = min(validation, key=lambda row: row["loss"], default={})
    first, last = (validation[0], validation[-1]) if validation else ({}, {})
    steps = max((row["step"] for row in (*train, *validation)), default=None)
    return (
        Cell(swatch.label, swatch=swatch),
        Cell(formats.plain(run.get("seed"))),
        Cell(formats.rate(run.get("learning_rate"))),
        Cell(formats.exact(steps)),
        Cell(formats.number(train[-1]["loss"] if train else None, 4)),
        Cell(formats.number(first.get("loss"), 4)),
        Cell(formats.number(least.get("loss"), 4)),
        Cell(formats.exact(least.get("step"))),
        Cell(formats.number(last.get("loss"), 4)),
    )


def _cost_points(
    methods: Sequence[Row], cost: str, quality: str, write_cost: Any, write_quality: Any
) -> list[dict[str, Any]]:
    points = []
    for row in methods:
        price = formats.finite(row.get(cost))
        mean, low, high = interval(row[quality])
        if price is None:
            continue
        points.append(
            {
                "method": str(row["method"]),
                "cost": price,
                "mean": mean,
                "low": mean if low is None else low,
                "high": mean if high is None else high,
                "cost_text": write_cost(price),
                "quality_text": write_quality(row[quality] if low is None else mean),
            }
        )
    return points


def _cost_table(
    methods: Sequence[Row], key: str, title: str, costs: Any, styles: Styles, write: Any
) -> Table:
    columns = (
        Column("method", numeric=False),
        Column(title),
        *(Column(cost_title) for _, cost_title, _, _ in costs),
    )
    rows = tuple(
        (
            Cell(name := str(row["method"]), swatch=styles[name]),
            Cell(write(interval(row[key])[0])),
            *(Cell(write_cost(row.get(cost))) for cost, _, _, write_cost in costs),
        )
        for row in methods
    )
    return Table(f"Cost of each method and its {title}.", columns, rows)
