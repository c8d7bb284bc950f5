"""Charts of adapters: figures by layer and kind of module, spectra, overlaps."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports.charts import Spec, view

SCHEME = "viridis"  # ordered to every eye, and on dark pages too
ROW_HEIGHT = 22


def layer_heat_map(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    number_format: str,
    description: str,
    logarithmic: bool = False,
) -> Spec:
    """A figure by block (across) and kind of module (down).

    Rows have `block` (a number, or "other"), `kind`, `module` and `value`.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    blocks = sorted({row["block"] for row in rows}, key=lambda b: (not isinstance(b, int), b))
    scale: Spec = {"scheme": SCHEME}
    if logarithmic and all(row["value"] > 0 for row in rows):
        scale["type"] = "log"
    return {
        **view(
            description,
            rows,
            mark={"type": "rect"},
            encoding={
                "x": {
                    "field": "block",
                    "type": "ordinal",
                    "title": "block",
                    "sort": blocks,
                    "axis": {"labelAngle": 0, "labelOverlap": "greedy", "ticks": False},
                },
                "y": {
                    "field": "kind",
                    "type": "ordinal",
                    "title": None,
                    "sort": kinds,
                    "axis": {"ticks": False},
                },
                "color": _colour("value", number_format, scale),
                "tooltip": [
                    {"field": "module", "type": "nominal", "title": "module"},
                    {
                        "field": "value",
                        "type": "quantitative",
                        "title": title,
                        "format": number_format,
                    },
                ],
            },
        ),
        "height": 50 + ROW_HEIGHT * max(2, len(kinds)),
    }


def overlap_heat_map(
    table: Sequence[Sequence[float]], *, first: str, second: str, description: str
) -> Spec:
    """phi(i, j) of the first i and j directions, i down and j across, from 0 to 1."""
    rows = [
        {"i": i, "j": j, "phi": round(value, 4)}
        for i, line in enumerate(table, start=1)
        for j, value in enumerate(line, start=1)
    ]
    axis = {"labelAngle": 0, "labelOverlap": "greedy", "ticks": False}
    return {
        **view(
            description,
            rows,
            mark={"type": "rect"},
            encoding={
                "x": {"field": "j", "type": "ordinal", "title": second, "axis": axis},
                "y": {"field": "i", "type": "ordinal", "title": first, "axis": axis},
                "color": _colour("phi", ".2f", {"scheme": SCHEME, "domain": [0, 1]}),
                "tooltip": [
                    {"field": "i", "type": "ordinal", "title": first},
                    {"field": "j", "type": "ordinal", "title": second},
                    {"field": "phi", "type": "quantitative", "title": "overlap", "format": ".3f"},
                ],
            },
        ),
        "height": 220,
    }


def spectrum_chart(rows: Sequence[Mapping[str, Any]], description: str) -> Spec:
    """Singular values relative to the first, a line a module (`module`, `index`, `value`)."""
    return view(
        description,
        rows,
        mark={"type": "line", "strokeWidth": 1, "opacity": 0.35, "color": "#0072b2"},
        encoding={
            "x": {
                "field": "index",
                "type": "quantitative",
                "title": "direction",
                "scale": {"nice": False},
                "axis": {"grid": False, "tickMinStep": 1},
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": "singular value / first",
                "scale": {"domain": [0, 1]},
                "axis": {"tickCount": 4},
            },
            "detail": {"field": "module", "type": "nominal"},
            "tooltip": [
                {"field": "module", "type": "nominal", "title": "module"},
                {"field": "index", "type": "quantitative", "title": "direction"},
                {"field": "value", "type": "quantitative", "title": "relative", "format": ".3f"},
            ],
        },
    )


def dimension_chart(rows: Sequence[Mapping[str, Any]], description: str) -> Spec:
    """Intrinsic dimension with its interval against the layer (`layer`, `state`, `mean`...)."""
    x = {
        "field": "layer",
        "type": "quantitative",
        "title": "layer",
        "axis": {"grid": False, "tickMinStep": 1},
    }
    y = {"type": "quantitative", "title": "intrinsic dimension", "axis": {"tickCount": 4}}
    colour = {
        "field": "state",
        "type": "nominal",
        "scale": {"domain": ["before", "after"], "range": ["#5f7183", "#0072b2"]},
        "legend": {"title": None, "orient": "top", "symbolOpacity": 1},
    }
    return view(
        description,
        rows,
        layer=[
            {
                "mark": {"type": "area", "opacity": 0.15},
                "encoding": {
                    "x": x,
                    "y": {"field": "low", **y},
                    "y2": {"field": "high"},
                    "color": colour,
                },
            },
            {
                "mark": {"type": "line", "point": True},
                "encoding": {"x": x, "y": {"field": "mean", **y}, "color": colour},
            },
        ],
    )


def _colour(field: str, number_format: str, scale: Spec) -> Spec:
    return {
        "field": field,
        "type": "quantitative",
        "scale": scale,
        "legend": {"title": None, "format": number_format, "orient": "right"},
    }
