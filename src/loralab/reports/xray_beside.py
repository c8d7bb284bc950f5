"""An X-ray beside the adapter itself: activations, other adapters, what was extracted."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.reports import formats, heatmaps
from loralab.reports.blocks import (
    Cell,
    Column,
    Facts,
    Figure,
    FigureGrid,
    Note,
    Notes,
    Section,
    Table,
)

Row = Mapping[str, Any]
MAX_CELLS = 24  # of an overlap's table, each way


def dimension_section(dimensions: Sequence[Row]) -> Section | None:
    """The dimension of hidden states before and after."""
    if not dimensions:
        return None
    rows = [
        {
            "layer": row["layer"],
            "state": state,
            "mean": row[state]["intrinsic"],
            "low": row[state]["low"],
            "high": row[state]["high"],
        }
        for row in dimensions
        for state in ("before", "after")
    ]
    cells = tuple(
        (
            Cell(str(row["layer"])),
            *(
                Cell(
                    formats.number(row[state]["intrinsic"], 1),
                    detail=formats.span(
                        formats.number(row[state]["low"], 1), formats.number(row[state]["high"], 1)
                    ),
                )
                for state in ("before", "after")
            ),
            *(Cell(formats.number(row[state]["linear"], 1)) for state in ("before", "after")),
        )
        for row in dimensions
    )
    columns = (
        Column("layer", numeric=False),
        Column("intrinsic, before", "95 % interval"),
        Column("intrinsic, after", "95 % interval"),
        Column("participation ratio, before"),
        Column("participation ratio, after"),
    )
    table = Table("Hidden states, averaged over each row's tokens.", columns, cells, wide=False)
    chart = Figure(
        "dimension-chart",
        "Intrinsic dimension",
        heatmaps.dimension_chart(rows, "Intrinsic dimension by layer, before and after"),
    )
    caption = (
        "How many dimensions the hidden states of real rows lie on (TwoNN, Facco et al. 2017)."
        " Layer 0 is the embeddings. Bands are 95 % intervals."
    )
    grid = FigureGrid(caption, (chart,), (table,))
    return Section("dimensions", "Activations before and after", "Activations", (grid,))


def overlap_section(index: int, overlap: Row) -> Section:
    """What the adapter shares with one other."""
    figures = []
    for side in ("inputs", "outputs"):
        table = [line[:MAX_CELLS] for line in overlap[side][:MAX_CELLS]]
        if table:
            spec = heatmaps.overlap_heat_map(
                table,
                first="directions of this one",
                second="directions of the other",
                description=f"Mean overlap of the deltas' {side}",
            )
            figures.append(Figure(f"overlap-{index}-{side}", f"Overlap on {side}", spec))
    rows = tuple(
        (
            Cell(module["module"]),
            Cell(formats.exact(module["num_directions"])),
            Cell(formats.number(module["cosine"], 3)),
            *(cell for side in ("inputs", "outputs") for cell in _side_cells(module[side])),
        )
        for module in overlap["modules"]
    )
    columns = (
        Column("module", numeric=False),
        Column("directions"),
        Column("cosine"),
        Column("inputs", "overlap"),
        Column("inputs", "by chance"),
        Column("outputs", "overlap"),
        Column("outputs", "by chance"),
    )
    caption = (
        "phi(i, j): how much of the first i directions of one delta lies in the first j of the"
        " other, from 0 to 1, mean over modules (Hu et al. 2021, figures 3 and 4, on the singular"
        " vectors of the deltas). Random directions give max(i, j) over the number of features."
    )
    grid = FigureGrid(caption, tuple(figures), (Table("", columns, rows, wide=False),))
    title = f"Against {overlap['name']}"
    return Section(f"overlap-{index}", title, "Overlap", (grid,))


def _side_cells(side: Row) -> tuple[Cell, Cell]:
    return (
        Cell(formats.number(side["shared"], 3), strong=bool(side["above_chance"])),
        Cell(formats.number(side["expected"], 3)),
    )


def extract_section(extracted: Row | None) -> Section | None:
    """The adapter that was made of a checkpoint's difference."""
    if not extracted:
        return None
    facts = Facts(
        (
            ("adapter", str(extracted["adapter"]), ""),
            ("rank", formats.exact(extracted["rank"]), ""),
            ("kept of the change", formats.percent(extracted["kept_share"]), ""),
            ("its size", formats.data_size(extracted["adapter_bytes"]), ""),
            ("the checkpoint's size", formats.data_size(extracted["checkpoint_bytes"]), ""),
        )
    )
    least = sorted(extracted["kept"].items(), key=lambda item: item[1])[:12]
    rows = tuple((Cell(module), Cell(formats.percent(share))) for module, share in least)
    table = Table(
        "Where least of the change is kept.",
        (Column("module", numeric=False), Column("kept of the squared norm")),
        rows,
        wide=False,
    )
    notes = tuple(Note("info", "", str(note)) for note in extracted["notes"])
    blocks = (facts, table, *((Notes(notes),) if notes else ()))
    return Section("extracted", "The adapter that was made of it", "Extracted", blocks)
