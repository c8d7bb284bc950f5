"""What a page must hold, and what must never reach it."""

import base64
import hashlib
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import OutputError
from loralab.reports import write_comparison_report
from loralab.reports.page import script_json

from . import sample
from .pages import Reader, comparison_page, run_page

PAYLOAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\u2028{{ 7*7 }}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("report")
    return comparison_page(folder, sample.comparison(), loss_curves=sample.loss_curves())


def test_the_verdict_is_the_headline_and_the_table_comes_first(page: Reader) -> None:
    verdict = sample.comparison()["verdict"]
    assert verdict in page.text
    places = [page.text.index(words) for words in (verdict, "The methods", "Each method was given")]
    assert places == sorted(places)
    assert [name for name, _ in page.elements].count("h1") == 1
    sections = [attributes["id"] for attributes in page.of("section")]
    assert sections[0] == "methods"
    assert {"#" + str(key) for key in sections} <= {a["href"] for a in page.of("a")}


def test_the_tables_hold_the_figures(page: Reader) -> None:
    for figure in (
        "80.1 % 77.4–82.8",  # accuracy
        "0.440 0.408–0.472",  # nll
        "1.19 M 5.0 % of 23.9 M",
        "393.0 MiB",
        "271 ms",
        "4.6 MiB",
        "1e-3",
        "−4.40",  # head against lora, in points
        "−5.88 to −2.92",
        "±2.10",
        "132.3 MiB",  # storage for ten tasks
        "500,000",  # the coin flip's parameter efficiency
        "0.5111 76.1 % best",  # in the table of learning rates
        "added to the grid",
        "An utterly charming film",
        "all-linear",
    ):
        assert figure in page.text, figure


def test_charts_are_vega_lite_with_their_data(page: Reader) -> None:
    charts = page.charts
    assert {attributes.get("data-chart") for attributes in page.of("div")} - {None} == set(charts)
    assert sum(key.startswith("rates-") for key in charts) == 4
    assert sum(key.startswith("loss-") for key in charts) == 4
    assert sum(key.startswith("cost-") for key in charts) == 8
    for spec in charts.values():
        assert spec["$schema"] == "https://vega.github.io/schema/vega-lite/v6.json"
        assert spec["description"]
        assert "layer" in spec or "mark" in spec
    full = next(c for k, c in charts.items() if k.startswith("rates-") and "full" in str(c))
    layers = {layer["name"]: layer["data"]["values"] for layer in full["layer"]}
    assert [point["rate"] for point in layers["extended"]] == [9e-5]
    assert [point["rate"] for point in layers["best"]] == [3e-5]
    assert full["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"


def test_every_chart_has_its_figures_as_a_table(page: Reader) -> None:
    assert len(page.of("details")) == len(page.of("figure")) > 0
    assert all("open" in attributes for attributes in page.of("details"))  # without JavaScript


@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_nothing_is_loaded_from_anywhere(tmp_path: Path, kind: str) -> None:
    if kind == "comparison":
        page = comparison_page(tmp_path, sample.comparison(), loss_curves=sample.loss_curves())
    else:
        page = run_page(tmp_path, sample.run())
    for tag, attributes in page.elements:
        assert "src" not in attributes and "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:")), tag
    assert not any("sourceMappingURL" in code for code in page.code)
    assert not re.search(r"url\(|@import", "".join(page.styles))


def test_the_policy_allows_just_the_scripts_of_the_page(page: Reader) -> None:
    policy = next(m["content"] for m in page.of("meta") if "http-equiv" in m)
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    for source in (*page.code, *page.styles):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == len(page.code) + len(page.styles)


def test_untrusted_texts_stay_texts(tmp_path: Path) -> None:
    hostile = _everywhere(sample.comparison(), PAYLOAD)
    page = comparison_page(
        tmp_path, hostile, loss_curves=_everywhere(sample.loss_curves(), PAYLOAD)
    )
    assert PAYLOAD.split("\u2028")[0] in page.text
    assert "{{ 7*7 }}" in page.text
    assert page.of("img") == []
    clean = comparison_page(tmp_path, sample.comparison(), loss_curves=sample.loss_curves())
    assert page.code == clean.code
    hostile_run = run_page(tmp_path, _everywhere(sample.run(), PAYLOAD))
    assert hostile_run.of("img") == []
    assert hostile_run.code == clean.code


def _everywhere(value: Any, payload: str) -> Any:
    """The same data with `payload` at the end of every string, keys of free tables included."""
    if isinstance(value, str):
        return value + payload
    if isinstance(value, list):
        return [_everywhere(item, payload) for item in value]
    if isinstance(value, dict):
        methods = set(sample.comparison()["settings"]["compare"]["methods"])
        return {
            key + payload if key in methods else key: _everywhere(item, payload)
            for key, item in value.items()
        }
    return value


def test_json_in_a_script_cannot_end_it() -> None:
    text = str(script_json({PAYLOAD: [PAYLOAD, math.nan, math.inf]}))
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.endswith("null,null]}")


@pytest.mark.parametrize("key", sorted(sample.comparison()))
def test_any_part_of_a_comparison_may_be_missing(tmp_path: Path, key: str) -> None:
    comparison = sample.comparison()
    del comparison[key]
    assert comparison_page(tmp_path, comparison).of("h1")


@pytest.mark.parametrize("key", sorted(set(sample.comparison()["methods"][0]) - {"method"}))
def test_any_figure_of_a_method_may_be_missing_or_null(tmp_path: Path, key: str) -> None:
    comparison = sample.comparison()
    del comparison["methods"][0][key]
    comparison["methods"][1][key] = None
    curves = {method: runs[:1] for method, runs in sample.loss_curves().items()}
    page = comparison_page(tmp_path, comparison, loss_curves=curves)
    assert "The methods" in page.text


@pytest.mark.parametrize("key", sorted(sample.run()))
def test_any_part_of_a_run_may_be_missing(tmp_path: Path, key: str) -> None:
    run = sample.run()
    del run[key]
    assert run_page(tmp_path, run).of("h1")


def test_an_empty_run_and_comparison_are_pages_too(tmp_path: Path) -> None:
    assert "no verdict" in comparison_page(tmp_path, {}).text
    assert run_page(tmp_path, {}).code == []


def test_a_run_shows_how_it_went_and_what_to_do_next(tmp_path: Path) -> None:
    page = run_page(tmp_path, sample.run())
    for words in (
        "accuracy 80.1 % (95 % interval 77.4–82.8) on the test rows",
        "warning: learning rate",
        "Next: try training.learning_rate=2e-4.",
        "loralab evaluate runs/reviews --data tweets",
        "adapter/adapter_model.safetensors",
        "1 min 01 s",
    ):
        assert words in page.text, words
    assert set(page.charts) == {"loss", "schedule"}


def test_a_winner_is_named_beside_its_mark(tmp_path: Path) -> None:
    page = comparison_page(tmp_path, sample.comparison() | {"winner": "lora"})
    assert "Winner: lora" in page.text


def test_a_diverged_rate_is_in_the_table_and_not_in_the_chart(tmp_path: Path) -> None:
    comparison = sample.comparison()
    comparison["methods"][0]["learning_rates"][-1]["validation_nll"] = None
    comparison["methods"][0]["open_end"] = "head's best learning rate lies on the edge of its grid"
    page = comparison_page(tmp_path, comparison)
    assert "3e-2 diverged" in page.text
    assert "because head's best learning rate lies on the edge" in page.text
    rates = [point["rate"] for point in page.charts["rates-0"]["layer"][0]["data"]["values"]]
    assert 3e-2 not in rates


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html"):
        write_comparison_report(sample.comparison(), tmp_path / "file" / "report.html")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to draw the charts with")
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_a_browser_draws_every_chart(tmp_path: Path, kind: str) -> None:
    if kind == "comparison":
        page = comparison_page(tmp_path, sample.comparison(), loss_curves=sample.loss_curves())
    else:
        page = run_page(tmp_path, sample.run())
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path / 'profile'}",
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"),
        (tmp_path / f"{kind}.html").as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ran.stderr, ran.stderr  # no error, no warning, nothing refused
    assert ran.stdout.count('<svg xmlns="http://www.w3.org/2000/svg"') == len(page.charts)
    assert "NaN" not in "".join(re.findall(r'\bd="[^"]*"', ran.stdout))
