"""One measure against another, a point a setting, with intervals both ways."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports.blocks import Swatch
from loralab.reports.charts import INK, Spec, by_method, view


def trade_off_chart(
    rows: Sequence[Mapping[str, Any]],
    styles: Sequence[Swatch],
    *,
    budget: float | None,
    x_title: str,
    y_title: str,
    description: str,
) -> Spec:
    """Gain (up) against forgetting (across), a line a dial.

    Rows have `dial`, `value`, `name`, `gain` with `low` and `high`, `forgotten` with `least` and
    `most`.
    `budget` is drawn as a line on the axis across.
    """
    scale = {"zero": True, "nice": True, "padding": 8}
    across = {"type": "quantitative", "title": x_title, "scale": scale, "axis": {"tickCount": 5}}
    up = {"type": "quantitative", "title": y_title, "scale": scale, "axis": {"tickCount": 5}}
    colour = {
        "field": "dial",
        "type": "nominal",
        "scale": by_method(styles, "colour"),
        "legend": None,
    }
    x, y = {"field": "forgotten", **across}, {"field": "gain", **up}
    tooltip = [
        {"field": "dial", "type": "nominal"},
        {"field": "name", "type": "nominal", "title": "setting"},
        {"field": "forgotten", "type": "quantitative", "format": ".4f"},
        {"field": "gain", "type": "quantitative", "format": ".4f"},
    ]

    def interval(ends: Spec) -> Spec:
        mark = {"type": "rule", "strokeWidth": 1.25, "opacity": 0.6}
        return {"mark": mark, "encoding": {**ends, "color": colour}}

    points = {"type": "point", "filled": True, "size": 70, "opacity": 1}
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.25, "opacity": 0.6},
            "encoding": {
                "x": x,
                "y": y,
                "color": colour,
                "order": {"field": "value", "type": "quantitative"},
            },
        },
        interval({"x": x, "y": {"field": "low", **up}, "y2": {"field": "high"}}),
        interval({"y": y, "x": {"field": "least", **across}, "x2": {"field": "most"}}),
        {
            "mark": points,
            "encoding": {
                "x": x,
                "y": y,
                "color": colour,
                "shape": {**colour, "scale": by_method(styles, "shape")},
                "tooltip": tooltip,
            },
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 8, "dy": -8, "fontSize": 11},
            "encoding": {
                "x": x,
                "y": y,
                "text": {"field": "name", "type": "nominal"},
                "color": {"value": INK},
            },
        },
    ]
    if budget is not None:
        layers.append(
            {
                "data": {"values": [{"budget": budget}]},
                "mark": {"type": "rule", "color": INK, "strokeDash": [6, 4]},
                "encoding": {"x": {"field": "budget", **across}},
            }
        )
    return {**view(description, rows, layer=layers), "height": 300}
