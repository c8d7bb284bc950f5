"""Quality against a cost: a point a method, with its interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from loralab.reports.blocks import Swatch
from loralab.reports.charts import AXIS_LABELS, GIB, INK, KIB, MIB, Spec, by_method, view
from loralab.reports.formats import finite

CostKind = Literal["count", "bytes", "seconds"]

_COST_LOG_RATIO = 5  # costs that span more than this ratio stand on a logarithmic axis


def cost_chart(
    rows: Sequence[Mapping[str, Any]],
    styles: Sequence[Swatch],
    *,
    cost_title: str,
    cost_kind: CostKind,
    quality_title: str,
    quality_format: str,
    description: str,
) -> Spec:
    """Quality with its interval against a cost, a point a method.

    Rows have `method`, `cost`, `mean`, `low`, `high` and, for the tooltip, `cost_text` and
    `quality_text`. `cost_kind` decides how the axis is written.
    """
    costs = [cost for row in rows if (cost := finite(row["cost"])) is not None]
    logarithmic = bool(costs) and min(costs) > 0 and max(costs) > _COST_LOG_RATIO * min(costs)
    x = {
        "field": "cost",
        "type": "quantitative",
        "scale": {"type": "log", "padding": 16}
        if logarithmic
        else {"zero": True, "padding": 16, "nice": True},
        "title": cost_title + (", logarithmic" if logarithmic else ""),
        "axis": {
            "grid": False,
            "tickCount": 3,
            "labelExpr": AXIS_LABELS[cost_kind],
            "labelOverlap": "greedy",
            **(_binary_ticks(costs, logarithmic) if cost_kind == "bytes" else {}),
        },
    }
    axis = {"tickCount": 4, "format": quality_format}
    y_scale = {"zero": False, "nice": True, "padding": 6}
    y = {"type": "quantitative", "scale": y_scale, "title": quality_title, "axis": axis}
    colour = {
        "field": "method",
        "type": "nominal",
        "scale": by_method(styles, "colour"),
        "legend": None,
    }
    shape = {**colour, "scale": by_method(styles, "shape")}
    tooltip = [
        {"field": "method", "type": "nominal", "title": "method"},
        {"field": "cost_text", "type": "nominal", "title": cost_title},
        {"field": "quality_text", "type": "nominal", "title": quality_title},
    ]
    return view(
        description,
        rows,
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7},
                "encoding": {
                    "x": x,
                    "y": {"field": "low", **y},
                    "y2": {"field": "high"},
                    "color": colour,
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": {"field": "mean", **y},
                    "color": colour,
                    "shape": shape,
                    "tooltip": tooltip,
                },
            },
        ],
    )


def level_line(value: float, quality_title: str, label: str) -> list[Spec]:
    """Layers that mark a value across a chart whose y axis is called `quality_title`."""
    y = {"field": "level", "type": "quantitative", "title": quality_title}
    data = {"values": [{"level": value, "label": f"{label} {value:g}"}]}
    rule = {"type": "rule", "strokeDash": [4, 3], "color": INK}
    text = {"type": "text", "align": "left", "dx": 4, "dy": -6, "fontSize": 11, "color": INK}
    words = {"y": y, "x": {"value": 0}, "text": {"field": "label"}}
    return [
        {"data": data, "mark": rule, "encoding": {"y": y}},
        {"data": data, "mark": text, "encoding": words},
    ]


def _binary_ticks(sizes: Sequence[int | float], logarithmic: bool) -> Spec:
    """Axis values at round binary sizes; nothing where Vega's own will do."""
    if not sizes or max(sizes) <= 0:
        return {}
    steps = [m * unit for unit in (1, KIB, MIB, GIB) for m in (1, 2, 5, 10, 20, 50, 100, 200, 500)]
    if logarithmic:
        decades = steps if max(sizes) < 100 * min(sizes) else steps[::3]
        ticks = [tick for tick in decades if min(sizes) / 4 <= tick <= 4 * max(sizes)]
    else:
        step = next((step for step in steps if max(sizes) / step < 3), steps[-1])
        ticks = [i * step for i in range(math.floor(max(sizes) / step) + 1)]
    return {"values": ticks} if len(ticks) > 1 else {}
