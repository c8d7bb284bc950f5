"""The page of `loralab rank`: every chart finds its figures, blocks stand in order."""

from typing import Any

import pytest

from loralab.reports.charts import INK
from loralab.reports.cost_chart import cost_chart, level_line
from loralab.reports.page import render_page
from loralab.reports.rank import rank_page

from .pages import Reader

INTERVAL = {"mean": 0.002, "low": -0.001, "high": 0.005, "upper": 0.004}


def row(rule: str, rank: int) -> dict[str, Any]:
    return {
        "rule": rule,
        "rank": rank,
        "parameters": 100 * rank,
        "bytes": 400 * rank,
        "relative_error": 0.2,
        "nll": 0.5,
        "accuracy": 0.7,
        "lost_nll": INTERVAL,
        "lost_accuracy": INTERVAL,
        "holds": True,
        "chosen": rank == 2,
    }


def document() -> dict[str, Any]:
    ranks = {"head": 1} | {f"layers.{block}.up": block for block in (1, 10, 11, 2)}
    chosen = {**row("global", 2), "ranks": ranks}
    return {
        "source": "somewhere",
        "base": "a-model",
        "unit": "nats a token",
        "tolerance": 0.01,
        "rows": {"choose": 60, "confirm": 50},
        "full": {"rank": 8, "bytes": 3200, "parameters": 800, "nll": 0.5, "accuracy": 0.7},
        "curve": [row("uniform", 4), row("uniform", 2), row("global", 2)],
        "choices": {"uniform": None, "global": chosen},
        "chosen": chosen,
        "verdict": "A verdict.",
    }


def test_every_chart_has_a_place_of_its_own_and_a_table() -> None:
    page = Reader(render_page(rank_page(document())))
    assert {places.get("data-chart") for places in page.of("div")} - {None} == set(page.charts)
    assert len(page.charts) == 3
    assert "layers.10.up 10" in page.text  # under the map of ranks


def test_blocks_stand_in_the_order_of_their_numbers() -> None:
    page = Reader(render_page(rank_page(document())))
    assert page.charts["ranks"]["encoding"]["x"]["sort"] == [1, 2, 10, 11, "other"]
    in_table = [page.text.index(f"layers.{block}.up") for block in (1, 2, 10, 11)]
    assert in_table == sorted(in_table)


def test_the_tolerance_is_a_line_in_the_chart() -> None:
    lost = Reader(render_page(rank_page(document()))).charts["lost"]
    marked = [layer["data"]["values"] for layer in lost["layer"] if "data" in layer]
    assert marked == [[{"level": 0.01, "label": "tolerance 0.01"}]] * 2


@pytest.mark.parametrize("span", [6, 8, 30, 99, 101, 4096])
@pytest.mark.parametrize("least", [3, 472_500, 7 * 2**30])
def test_an_axis_of_sizes_has_several_of_them(least: int, span: int) -> None:
    rows = [
        {"method": "m", "cost": cost, "mean": 0.5, "low": 0.4, "high": 0.6}
        for cost in (least, least * span)
    ]
    chart = cost_chart(
        rows, [], cost_title="size", cost_kind="bytes", quality_title="accuracy",
        quality_format=".1%", description="",
    )  # fmt: skip
    values = chart["layer"][0]["encoding"]["x"]["axis"].get("values")
    assert values is None or sum(least <= value <= least * span for value in values) >= 2


def test_what_is_drawn_in_ink_is_legible_on_dark_pages() -> None:
    line, words = level_line(0.01, "lost", "tolerance")
    assert line["mark"]["color"] == words["mark"]["color"] == INK
    page = Reader(render_page(rank_page(document())))
    for chart in page.charts.values():
        assert chart["config"]["axis"]["labelColor"] == INK
        assert chart["config"]["legend"]["labelColor"] == INK
    [sheet] = page.styles
    for part in ("fill", "stroke"):
        assert f'.chart [{part}="{INK}"] {{ {part}: var(--ink-2); }}' in sheet
