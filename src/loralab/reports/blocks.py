"""What a page is made of: sections of tables, figures, facts and texts, as plain values.

A page is built as a tree of these and rendered by one template; nothing here holds HTML.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Swatch:
    """How one method is told from the others: a colour and, for those who see none, a shape."""

    label: str
    colour: str
    shape: str
    path: str  # SVG path of the shape in a 12 x 12 box


@dataclass(frozen=True)
class Bar:
    """An interval drawn in a cell; every coordinate is a share (0 to 1) of the cell's axis."""

    low: float
    middle: float
    high: float
    zero: float | None = None
    band: tuple[float, float] | None = None  # what could not have been found
    colour: str | None = None  # None: the colour of text
    hollow: bool = False


@dataclass(frozen=True)
class Cell:
    """A figure: `detail` stands smaller below it, `title` shows the exact value."""

    text: str
    detail: str = ""
    title: str = ""
    swatch: Swatch | None = None
    bar: Bar | None = None
    heat: int | None = None  # 0 (empty) to 10 (full): the shade of a matrix cell
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column's heading; `ticks` are (share of the axis, label) of a column of bars.

    Over bars the label is for screen readers only, and `bar_width` is their axis in pixels.
    """

    label: str
    detail: str = ""
    numeric: bool = True
    ticks: tuple[tuple[float, str], ...] = ()
    bar_width: int = 120


@dataclass(frozen=True)
class Table:
    """The first cell of each row is its heading; one that repeats the row above is not drawn."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    heading: str = ""
    swatch: Swatch | None = None
    wide: bool = True  # False: as narrow as its content


@dataclass(frozen=True)
class TableGrid:
    """Small tables side by side; `packed` fills columns of equal width with them."""

    kind: ClassVar[str] = "tables"
    tables: tuple[Table, ...]
    packed: bool = False


@dataclass(frozen=True)
class Figure:
    """One chart: a Vega-Lite specification."""

    key: str
    heading: str
    spec: Mapping[str, Any]
    swatch: Swatch | None = None
    legend: tuple[Swatch, ...] = ()


@dataclass(frozen=True)
class FigureGrid:
    """Charts side by side that share a caption, and the tables of their figures.

    `broad`: at most two beside each other.
    """

    kind: ClassVar[str] = "figures"
    caption: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    legend: tuple[Swatch, ...] = ()
    broad: bool = False


@dataclass(frozen=True)
class Facts:
    """Terms and their values; a fact's third part is its exact value or empty."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Quote:
    """The text of a data row, and what each method said of it."""

    text: str
    source: str
    rows: tuple[tuple[Cell, str], ...]


@dataclass(frozen=True)
class Quotes:
    """Texts of data rows."""

    kind: ClassVar[str] = "quotes"
    quotes: tuple[Quote, ...]


@dataclass(frozen=True)
class Note:
    """A finding: `level` is "ok", "info", "warning" or "error"."""

    level: str
    title: str
    text: str
    next_step: str = ""


@dataclass(frozen=True)
class Notes:
    """Findings, each with its level in words."""

    kind: ClassVar[str] = "notes"
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Commands:
    """Shell commands, each with what it does."""

    kind: ClassVar[str] = "commands"
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Strip:
    """Pictures in a row as one image: `source` is its data URI, `alternative` says it in words."""

    label: str
    detail: str
    source: str
    alternative: str


@dataclass(frozen=True)
class Gallery:
    """Strips below each other, whose pictures stand in columns of these names."""

    kind: ClassVar[str] = "gallery"
    heading: str
    caption: str
    columns: tuple[str, ...]
    strips: tuple[Strip, ...]


Block = Table | TableGrid | FigureGrid | Facts | Quotes | Notes | Commands | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `short` is its name in the page's contents."""

    key: str
    title: str
    short: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report. `badge` is a method or None where there is nothing to point at."""

    title: str
    kicker: str
    headline: str
    sections: tuple[Section, ...]
    status: str = ""
    badge: Swatch | None = None
    facts: Facts = field(default_factory=lambda: Facts(()))
    footer: str = ""
