"""Charts as data: plain rows -> Vega-Lite specifications.

The specifications hold their own colours and data, so each can be lifted out of a page and drawn
by any Vega-Lite. Inside a page its style sheet recolours axes and text for dark mode and print.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loralab.reports.blocks import Swatch
from loralab.reports.series import LOG_RATIO

Spec = dict[str, Any]

# Told apart with every common colour blindness, and at least 3:1 on both paper and night.
_STYLES = {
    "lora": ("#0072b2", "circle"),
    "frozen": ("#009e73", "square"),
    "full": ("#d55e00", "triangle-up"),
    "head": ("#aa4499", "diamond"),
}
_SPARE_STYLES = (("#8c7a00", "triangle-down"), ("#5f7183", "cross"), *_STYLES.values())
_SHAPE_PATHS = {
    "circle": "M6 1.5a4.5 4.5 0 1 0 .01 0Z",
    "square": "M2 2h8v8h-8Z",
    "triangle-up": "M6 1.2 11 10H1Z",
    "triangle-down": "M6 10.8 11 2H1Z",
    "diamond": "M6 .8 11.2 6 6 11.2 .8 6Z",
    "cross": "M4.4 1h3.2v3.4H11v3.2H7.6V11H4.4V7.6H1V4.4h3.4Z",
}
INK, _RULE = "#3d4650", "#dfe3e8"  # report.css knows the ink by its number
KIB, MIB, GIB = 2**10, 2**20, 2**30
# Vega expressions that write an axis value, by what the axis measures.
AXIS_LABELS = {
    "count": "datum.value < 1000 ? format(datum.value, '~r') : format(datum.value, '~s')",
    "bytes": (
        "datum.value == 0 ? '0' : "
        f"datum.value >= {GIB} ? format(datum.value / {GIB}, '.3~r') + ' GiB' : "
        f"datum.value >= {MIB} ? format(datum.value / {MIB}, '.3~r') + ' MiB' : "
        f"datum.value >= {KIB} ? format(datum.value / {KIB}, '.3~r') + ' KiB' : "
        "format(datum.value, '.3~r') + ' B'"
    ),
    "seconds": (
        "datum.value == 0 ? '0' : "
        "datum.value < 1 ? format(datum.value * 1000, '.3~r') + ' ms' : "
        "format(datum.value, '.3~r') + ' s'"
    ),
}


def swatches(methods: Iterable[str]) -> dict[str, Swatch]:
    """A colour and a shape for each method: the four known ones always keep theirs."""
    spare = iter(_SPARE_STYLES * 4)
    styles: dict[str, Swatch] = {}
    for method in methods:
        colour, shape = _STYLES.get(method) or next(spare, _SPARE_STYLES[0])
        styles[method] = Swatch(method, colour, shape, _SHAPE_PATHS[shape])
    return styles


def learning_rate_chart(
    points: Sequence[Mapping[str, Any]], swatch: Swatch, domain: Sequence[float], description: str
) -> Spec:
    """Validation loss against learning rate.

    Each point has `rate`, `loss`, `accuracy` (or None), `best` and `extended` (the grid was
    lengthened by it). `domain` is the range of the loss axis, shared between methods.
    """
    x = {
        "field": "rate",
        "type": "quantitative",
        "scale": {"type": "log", "nice": False, "padding": 14},
        "title": "learning rate",
        "axis": {
            "values": [point["rate"] for point in points],
            "format": "~e",
            "labelOverlap": "greedy",
            "grid": False,
        },
    }
    y = {
        "field": "loss",
        "type": "quantitative",
        "scale": _scale(domain),
        "title": "validation loss",
        "axis": {"tickCount": 4},
    }
    tooltip = [
        {"field": "rate", "type": "quantitative", "title": "learning rate", "format": "~e"},
        {"field": "loss", "type": "quantitative", "title": "validation loss", "format": ".4f"},
        {"field": "accuracy", "type": "quantitative", "title": "accuracy", "format": ".1%"},
        {"field": "extended", "type": "nominal", "title": "grid extended by it"},
    ]
    point = {"type": "point", "shape": swatch.shape, "size": 55, "opacity": 1}
    ring = {"shape": "circle", "size": 260, "filled": False, "stroke": INK, "strokeWidth": 1.5}
    layers = {
        "line": (points, {"type": "line", "color": swatch.colour, "strokeWidth": 1.5}),
        "tried": (
            [p for p in points if not p["extended"]],
            {**point, "filled": True, "color": swatch.colour},
        ),
        "extended": (
            [p for p in points if p["extended"]],
            {**point, "fill": "white", "stroke": swatch.colour, "strokeWidth": 1.5},
        ),
        "best": ([p for p in points if p["best"]], {**point, **ring}),
    }
    return {
        **view(description, None),
        "layer": [
            {
                "name": name,
                "data": {"values": list(rows)},
                "mark": mark,
                "encoding": {"x": x, "y": y, "tooltip": tooltip},
            }
            for name, (rows, mark) in layers.items()
            if rows
        ],
    }


def loss_chart(
    train: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    swatch: Swatch,
    domain: Sequence[float],
    description: str,
) -> Spec:
    """Smoothed training loss (thin) and validation loss (with points) against the step.

    Rows have `run`, `step` and `loss`; `domain` is the range of the loss axis.
    """
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "scale": {"nice": False},
        "axis": {"grid": False, "tickCount": 4},
    }
    y = {
        "field": "loss",
        "type": "quantitative",
        "scale": {**_scale(domain), "clamp": True},
        "title": "loss",
        "axis": {"tickCount": 4},
    }
    detail = {"field": "run", "type": "nominal"}
    tooltip = [
        {"field": "run", "type": "nominal", "title": "run"},
        {"field": "step", "type": "quantitative", "title": "step", "format": ","},
        {"field": "loss", "type": "quantitative", "title": "loss", "format": ".4f"},
    ]
    line = {"type": "line", "color": swatch.colour}
    point = {"shape": swatch.shape, "filled": True, "size": 36, "color": swatch.colour}
    layers = {
        "train": (train, {**line, "strokeWidth": 1, "opacity": 0.45}),
        "validation": (validation, {**line, "strokeWidth": 2, "point": {**point, "opacity": 1}}),
    }
    return {
        **view(description, None),
        "layer": [
            {
                "name": name,
                "data": {"values": list(rows)},
                "mark": mark,
                "encoding": {"x": x, "y": y, "detail": detail, "tooltip": tooltip},
            }
            for name, (rows, mark) in layers.items()
            if rows
        ],
    }


def schedule_chart(
    rows: Sequence[Mapping[str, Any]], styles: Sequence[Swatch], description: str
) -> Spec:
    """Learning rate against the step, a line a parameter group (`group`, `step`, `rate`)."""
    return view(
        description,
        rows,
        mark={"type": "line", "strokeWidth": 1.75},
        encoding={
            "x": {
                "field": "step",
                "type": "quantitative",
                "title": "step",
                "scale": {"nice": False},
                "axis": {"grid": False, "tickCount": 4},
            },
            "y": {
                "field": "rate",
                "type": "quantitative",
                "title": "learning rate",
                "axis": {
                    "tickCount": 4,
                    "labelExpr": "datum.value == 0 ? '0' : format(datum.value, '~e')",
                },
            },
            "color": {
                "field": "group",
                "type": "nominal",
                "scale": by_method(styles, "colour"),
                "legend": None,
            },
            "strokeDash": {  # so that two groups with one rate are both seen
                "field": "group",
                "type": "nominal",
                "scale": {"range": [[1, 0], [6, 6], [2, 4]]},
                "legend": None,
            },
            "tooltip": [
                {"field": "group", "type": "nominal", "title": "parameters"},
                {"field": "step", "type": "quantitative", "title": "step", "format": ","},
                {"field": "rate", "type": "quantitative", "title": "learning rate", "format": "~e"},
            ],
        },
    )


def memory_chart(
    rows: Sequence[Mapping[str, Any]],
    styles: Sequence[Swatch],
    capacity: int | None,
    description: str,
) -> Spec:
    """Bytes held over a step as stacked areas, a kind each, and the device's capacity as a line.

    Rows have `at` (the order of time), `moment` (its name), `kind` and `bytes`; `styles` are the
    kinds' in the order they are stacked from below.
    """
    x = {"field": "at", "type": "quantitative", "title": "the step, in the order of time"}
    x |= {"axis": {"labels": False, "ticks": False, "grid": False}, "scale": {"nice": False}}
    size = {"labelExpr": AXIS_LABELS["bytes"], "tickCount": 5}
    order = {swatch.label: index for index, swatch in enumerate(styles)}
    stacked = [{**row, "order": order[row["kind"]]} for row in rows]
    area = {
        "name": "held",
        "data": {"values": stacked},
        "mark": {"type": "area", "opacity": 0.85, "line": False},
        "encoding": {
            "x": x,
            "y": {"field": "bytes", "type": "quantitative", "stack": "zero", "axis": size},
            "color": {
                "field": "kind",
                "type": "nominal",
                "scale": by_method(styles, "colour"),
                "legend": None,
            },
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [
                {"field": "moment", "type": "nominal"},
                {"field": "kind", "type": "nominal"},
                {"field": "bytes", "type": "quantitative", "format": ","},
            ],
        },
    }
    line = {
        "name": "capacity",
        "data": {"values": [{"bytes": capacity}] if capacity else []},
        "mark": {"type": "rule", "color": INK, "strokeDash": [6, 4]},
        "encoding": {"y": {"field": "bytes", "type": "quantitative", "title": None}},
    }
    highest = _highest_stack(rows)
    near = capacity is not None and capacity < 3 * highest
    return {**view(description, None), "layer": [area, line] if near else [area]}


def _highest_stack(rows: Sequence[Mapping[str, Any]]) -> int:
    sums: dict[int, int] = {}
    for row in rows:
        sums[row["at"]] = sums.get(row["at"], 0) + row["bytes"]
    return max(sums.values(), default=0)


def _scale(domain: Sequence[float]) -> Spec:
    low, high = domain
    if low > 0 and high > LOG_RATIO * low:
        return {"type": "log", "domain": [low, high], "nice": False}
    return {"type": "linear", "domain": [low, high], "nice": False, "zero": False}


def by_method(styles: Sequence[Swatch], part: str) -> Spec:
    """The scale that gives each label its colour or shape (`part`)."""
    return {
        "domain": [style.label for style in styles],
        "range": [getattr(style, part) for style in styles],
    }


def view(description: str, rows: Sequence[Mapping[str, Any]] | None, **parts: Any) -> Spec:
    """A Vega-Lite specification in the look of all charts: what it shows, its data, its parts."""
    data = {} if rows is None else {"data": {"values": list(rows)}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "height": 180,
        "autosize": {"type": "fit", "contains": "padding"},
        **data,
        **parts,
        "config": _CONFIG,
    }


_CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "padding": 2,
    "axis": {
        "domain": False,
        "tickColor": _RULE,
        "tickSize": 4,
        "gridColor": _RULE,
        "labelColor": INK,
        "labelFontSize": 11,
        "labelPadding": 5,
        "labelSeparation": 3,
        "titleColor": INK,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "axisX": {"domain": True, "domainColor": _RULE},
    "legend": {"labelColor": INK, "titleColor": INK},
}
