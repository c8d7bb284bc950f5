"""Reading a page back as a browser would: its elements, texts, scripts and charts."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from loralab.reports import write_comparison_report, write_run_report

_VOID = {"meta", "link", "br", "img", "input", "hr"}
_SHAPES = {"path", "rect", "line", "circle"}  # written self-closing


class Reader(HTMLParser):
    """Checks that tags match; collects attributes, visible text, scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        names = [name for _, attributes in self.elements if (name := attributes.get("id"))]
        assert len(set(names)) == len(names), "an id stands twice"

    @property
    def text(self) -> str:
        """All visible text, with single spaces."""
        return " ".join(" ".join(self.words).split())

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """The specifications by their id."""
        return {
            str(attributes["id"]).removeprefix("chart-"): json.loads(content)
            for attributes, content in self.scripts
            if attributes.get("type") == "application/json"
        }

    @property
    def code(self) -> list[str]:
        """The scripts a browser would run."""
        return [content for attributes, content in self.scripts if "type" not in attributes]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "style":
            self.styles.append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _SHAPES
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            attributes, content = self.scripts[-1]
            self.scripts[-1] = (attributes, content + data)
        elif inside == "style":
            self.styles[-1] += data
        else:
            self.words.append(data.replace("\N{NO-BREAK SPACE}", " "))


def comparison_page(folder: Path, comparison: dict[str, Any], **options: Any) -> Reader:
    """A comparison's report, written to `folder` and read back."""
    path = folder / "comparison.html"
    write_comparison_report(comparison, path, **options)
    return Reader(path.read_text(encoding="utf-8"))


def run_page(folder: Path, run: dict[str, Any]) -> Reader:
    """A run's report, written to `folder` and read back."""
    path = folder / "run.html"
    write_run_report(run, path)
    return Reader(path.read_text(encoding="utf-8"))
