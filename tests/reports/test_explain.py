"""The page that teaches: every statement is checked by a real browser, and vectors turn."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loralab.reports import write_explanation, write_xray_report

from .pages import Reader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>alert(1)</script>"

# what a reader does, done by a script: drags, presses a key, types a matrix, moves a slider
PROBE = """
(() => {
  const space = document.getElementById("space");
  const said = (key, value) => { document.documentElement.dataset[key] = value; };
  const point = (type, x, y) =>
    space.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y }));
  const before = [space.dataset.turn, space.querySelector(".vector").getAttribute("x2")];
  point("pointerdown", 0, 0); point("pointermove", 60, 20); point("pointerup", 60, 20);
  const after = [space.dataset.turn, space.querySelector(".vector").getAttribute("x2")];
  said("turned", String(before[0] !== after[0] && before[1] !== after[1]));
  space.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
  said("keyed", String(space.dataset.turn !== after[0]));
  const ranks = [];
  for (const name of ["identity", "line", "plane"]) {
    document.querySelector(`[data-example="${name}"]`).click();
    ranks.push(space.dataset.rank);
  }
  const inputs = [...document.querySelectorAll("#matrix input")];
  [1, 2, 3, 2, 4, 6, 0, 1, 1].forEach((value, i) => { inputs[i].value = value; });
  inputs[0].dispatchEvent(new Event("input"));
  said("ranks", [...ranks, space.dataset.rank].join(" "));
  document.getElementById("again").click();
  const optimiser = document.getElementById("optimiser");
  const losses = document.getElementById("first-steps").textContent;
  optimiser.value = "sgd"; optimiser.dispatchEvent(new Event("input"));
  said("trained", String(losses !== document.getElementById("first-steps").textContent));
  document.querySelector('[data-pass="backward"]').click();
  said("backward", document.getElementById("passes").dataset.shown);
})();
"""


def xray() -> dict[str, Any]:
    modules = [
        {
            "module": f"model.layers.{block}.mlp.{kind}{HOSTILE if block == 0 else ''}",
            "block": block,
            "kind": f"mlp.{kind}",
            "layer_kind": "linear",
            "shape": [8, 8],
            "num_parameters": 32,
            "num_bytes": 128,
            "singular_values": [2.0, 1.0 / (1 + block)],
            "norm": 2.1 + block,
            "spectral_norm": 2.0,
            "numerical_rank": 2,
            "directions_90": 1,
            "directions_99": 2,
            "effective_rank": 1.4,
            "stable_rank": 1.2,
            "rank": 2,
            "scale": 2.0,
            "norm_A": 1.0,
            "norm_B": 2.0,
            "balance": 2.0,
            "base": {
                "weight_norm": 9.0,
                "weight_spectral_norm": 3.0,
                "relative_norm": 0.2,
                "relative_spectral_norm": 0.6,
                "along_delta": 0.2,
                "along_own": 3.0,
                "along_random": 0.1,
                "amplification": 11.0,
                "intruders": block,
                "strangers": block,
                "onset": 2.0,
                "onset_scale": 1.0,
                "magnitude_change": None,
            },
            "notes": ["a note"],
        }
        for block in range(4)
        for kind in ("up", "down")
    ]
    side = {"first": 0.5, "shared": 0.4, "expected": 0.1, "std": 0.01, "above_chance": True}
    overlap = {
        "name": "runs/other",
        "cosine": 0.3,
        "modules": [
            {
                "module": "model.layers.0.mlp.up",
                "block": 0,
                "kind": "mlp.up",
                "num_directions": 2,
                "cosine": 0.3,
                "inputs": side,
                "outputs": side,
            }
        ],
        "only_first": [],
        "only_second": [],
        "inputs": [[0.5, 0.3], [0.4, 0.4]],
        "outputs": [[0.5, 0.3], [0.4, 0.4]],
    }
    dimension = {"intrinsic": 9.0, "low": 8.0, "high": 10.0, "linear": 4.0, "num_points": 300}
    other = {
        "name": "score.weight",
        "role": "whole module",
        "shape": [2, 8],
        "num_bytes": 64,
        "relative_change": None,
        "note": "new",
    }
    return {
        "source": f"runs/rank-2{HOSTILE}",
        "kind": "adapter",
        "base": "tiny",
        "summary": [
            "Rank 2, but 90 % of the change lies in 1 direction.",
            "12 intruder dimensions",
        ],
        "figures": {"storage": {"total_bytes": 1088, "full_weights_bytes": 4096}},
        "dimensions": [{"layer": i, "before": dimension, "after": dimension} for i in range(3)],
        "extracted": {
            "adapter": "out",
            "rank": 2,
            "kept_share": 0.9,
            "kept": {"model.layers.0.mlp.up": 0.9},
            "whole": [],
            "notes": ["a note"],
            "adapter_bytes": 100,
            "checkpoint_bytes": 10000,
        },
        "xray": {
            "settings": {"rank": 2, "alpha": 4, "parameters": 256},
            "modules": modules,
            "others": [other],
            "overlaps": [overlap],
        },
    }


def browse(path: Path, folder: Path) -> str:
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={folder / 'profile'}",
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"),
        path.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    assert "NaN" not in "".join(re.findall(r'\b(?:d|points|x2|y2)="[^"]*"', ran.stdout))
    return ran.stdout


def test_the_page_loads_nothing_and_names_no_handler(tmp_path: Path) -> None:
    path = tmp_path / "explain.html"
    write_explanation(path, xray=xray())
    page = Reader(path.read_text(encoding="utf-8"))
    for tag, attributes in page.elements:
        assert "src" not in attributes and "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:")), tag
    policy = next(m["content"] for m in page.of("meta") if "http-equiv" in m)
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy
    assert f"runs/rank-2{HOSTILE}" in page.text
    assert not any("alert(1)" in code for code in page.code)


def test_without_an_adapter_there_is_no_section_of_it(tmp_path: Path) -> None:
    write_explanation(tmp_path / "page.html")
    page = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "own" not in [attributes["id"] for attributes in page.of("section")]
    assert [name for name, _ in page.elements].count("h1") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to read the page with")
def test_a_browser_finds_every_statement_true_and_turns_the_vectors(tmp_path: Path) -> None:
    path = tmp_path / "explain.html"
    write_explanation(path, xray=xray(), extra_scripts=[PROBE])
    dom = browse(path, tmp_path)
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', dom[: dom.index("<head")]))
    assert told["checks"] == "passed"
    assert told["turned"] == told["keyed"] == told["trained"] == "true"
    assert told["ranks"] == "3 1 2 2"
    assert told["backward"] == "backward"
    count = re.search(r"(\d+) statements of this page have just been checked", dom)
    assert count is not None and int(count[1]) >= 15
    assert dom.count("held in all 200") >= 6
    assert "70 GB. One base and 10 adapters: 7.5 GB" in dom
    assert '<option value="0">model.layers.0.mlp.up' in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to draw the charts with")
def test_a_browser_draws_every_chart_of_an_xray(tmp_path: Path) -> None:
    path = tmp_path / "xray.html"
    write_xray_report(xray(), path)
    page = Reader(path.read_text(encoding="utf-8"))
    dom = browse(path, tmp_path)
    assert len(page.charts) >= 12
    assert dom.count('<svg xmlns="http://www.w3.org/2000/svg"') == len(page.charts)


@pytest.mark.parametrize("key", sorted(xray()))
def test_any_part_of_an_xray_may_be_missing(tmp_path: Path, key: str) -> None:
    document = xray()
    del document[key]
    write_xray_report(document, tmp_path / "page.html")
    assert Reader((tmp_path / "page.html").read_text(encoding="utf-8")).of("h1")
