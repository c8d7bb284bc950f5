"""The page that teaches: rank, laws, first steps, inference; with the reader's own adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.files import write_text
from loralab.reports.page import asset, render_template

SCRIPTS = ("algebra", "space", "laws", "sizes", "training", "spectra")
IDENTITY = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
MAX_VALUES = 128  # singular values of a module that are drawn


def write_explanation(
    path: str | Path, *, xray: Mapping[str, Any] | None = None, extra_scripts: Sequence[str] = ()
) -> None:
    """Write the page to `path`, whole or not at all; it needs no network.

    xray: what `loralab inspect --json` prints of the reader's own adapter. extra_scripts run after
    the page's own (tests turn the vectors with them). Raises `OutputError`.
    """
    scripts = [asset("templates", f"explain/{name}.js") for name in SCRIPTS]
    html = render_template(
        "explain.html.j2",
        styles=[asset("templates", "report.css"), asset("templates", "explain.css")],
        scripts=[*scripts, *extra_scripts],
        examples=IDENTITY,
        own=None if xray is None else _own(xray),
    )
    write_text(Path(path), html)


def _own(document: Mapping[str, Any]) -> dict[str, Any]:
    modules = document["xray"]["modules"]
    return {
        "source": str(document["source"]),
        "summary": [str(line) for line in document["summary"]],
        "modules": [
            {
                "module": module["module"],
                "rank": module["rank"],
                "directions": module["directions_90"],
                "values": [float(f"{v:.4g}") for v in module["singular_values"][:MAX_VALUES]],
            }
            for module in modules
        ],
    }
