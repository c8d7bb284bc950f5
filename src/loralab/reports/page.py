"""A page of blocks -> one HTML file that opens without a network.

Texts of data rows, names and settings are untrusted. They reach the page through Jinja's
autoescaping or as JSON with `<`, `>` and `&` escaped, and a content security policy lets the
browser run no script but the page's own (by hash) and open no connection at all.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loralab.files import write_text
from loralab.reports.blocks import Page

# vega-embed draws; the other two are what it needs, in this order.
_LIBRARIES = ("vega", "vega-lite", "vega-embed")


def write_page(page: Page, path: str | Path) -> None:
    """Render `page` and put it at `path`, whole or not at all.

    Raises `OutputError` where the file cannot be written.
    """
    write_text(Path(path), render_page(page))


def render_page(page: Page) -> str:
    """The page as one HTML document."""
    has_charts = any(
        block.kind == "figures" for section in page.sections for block in section.blocks
    )
    scripts = [*map(_library, _LIBRARIES), asset("templates", "charts.js")] if has_charts else []
    return render_template(
        "page.html.j2", styles=[asset("templates", "report.css")], scripts=scripts, page=page
    )


def render_template(
    template: str, *, styles: Sequence[str], scripts: Sequence[str], **values: Any
) -> str:
    """A template with these styles and scripts, which its policy alone lets run."""
    html = (
        _environment()
        .get_template(template)
        .render(
            styles=[Markup(style) for style in styles],
            scripts=[Markup(script) for script in scripts],
            policy=_policy(scripts, styles),
            **values,
        )
    )
    # JSON may have smuggled in half a surrogate pair, which UTF-8 cannot hold.
    return html.encode("utf-8", "replace").decode("utf-8")


def script_json(value: Any) -> Markup:
    """Plain data as JSON that is safe inside a `<script>` element.

    Numbers that are not finite become null. Reference: HTML Living Standard 4.12.1.3.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    script_sources = " ".join(map(_source_hash, scripts)) or "'none'"
    return (
        f"default-src 'none'; script-src {script_sources}; "
        f"style-src {' '.join(map(_source_hash, styles))}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loralab.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = script_json
    return environment


@cache
def asset(folder: str, name: str) -> str:
    """A file of this room as text."""
    return (resources.files("loralab.reports") / folder / name).read_text(encoding="utf-8")


@cache
def _library(name: str) -> str:
    """A vendored build under its licence, without the link to a source map that is not there."""
    code = re.sub(r"//# sourceMappingURL=\S+\s*$", "", asset("vendor", f"{name}.min.js"))
    licence = asset("vendor", f"LICENSE-{name}.txt").strip()
    return f"/*! {name}\n\n{licence}\n*/\n{code}"
