"""The X-ray of an adapter -> a page: what it means, heat maps by layer and module, every figure."""

from collections.abc import Callable, Mapping, Sequence
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
    Page,
    Section,
    Table,
)
from loralab.reports.parts import table_of
from loralab.reports.xray_beside import dimension_section, extract_section, overlap_section

Row = Mapping[str, Any]
MAX_LINES = 250  # spectra that are drawn


def xray_page(document: Row) -> Page:
    """The page of what `loralab inspect --json` prints; parts that are missing are left out."""
    xray = document.get("xray") or {}
    modules = [module for module in xray.get("modules") or () if module]
    summary = [str(line) for line in document.get("summary") or ()]
    sections = [
        _meaning_section(summary),
        _map_section(modules),
        _base_section(modules),
        dimension_section(document.get("dimensions") or ()),
        *(overlap_section(index, o) for index, o in enumerate(xray.get("overlaps") or ())),
        extract_section(document.get("extracted")),
        _module_section(modules),
        _other_section(xray.get("others") or ()),
    ]
    return Page(
        title=f"X-ray of {document.get('source', 'an adapter')}",
        kicker=_kicker(document),
        headline=summary[0] if summary else "An X-ray without figures",
        facts=_facts(document),
        sections=tuple(section for section in sections if section is not None),
    )


def _kicker(document: Row) -> str:
    base = f" on {document['base']}" if document.get("base") else ""
    return f"X-ray of {document.get('kind', 'adapter')} {document.get('source', '')}{base}"


def _facts(document: Row) -> Facts:
    settings = (document.get("xray") or {}).get("settings") or {}
    storage = (document.get("figures") or {}).get("storage") or {}
    rows = [
        (formats.words(key), formats.plain(value), "")
        for key, value in settings.items()
        if key != "parameters"
    ]
    if "parameters" in settings:
        count = settings["parameters"]
        rows.append(("parameters", formats.count(count), formats.exact(count)))
    if "total_bytes" in storage:
        size = storage["total_bytes"]
        rows.append(("size", formats.data_size(size), f"{formats.exact(size)} bytes"))
        full = storage.get("full_weights_bytes")
        rows.append(("the same weights in full (fp32)", formats.data_size(full), ""))
    return Facts(tuple(rows))


def _meaning_section(summary: Sequence[str]) -> Section | None:
    if not summary:
        return None
    notes = tuple(
        Note("warning" if "intruder dimension" in line and line[0].isdigit() else "info", "", line)
        for line in summary
    )
    return Section("meaning", "What it means", "Meaning", (Notes(notes),))


Get = Callable[[Row], Any]


def _figure(
    key: str, heading: str, modules: Sequence[Row], get: Get, number_format: str, **options: Any
) -> Figure | None:
    rows = [
        {
            "block": "other" if module["block"] is None else module["block"],
            "kind": module["kind"],
            "module": module["module"],
            "value": value,
        }
        for module in modules
        if (value := formats.finite(get(module))) is not None
    ]
    if not rows:
        return None
    spec = heatmaps.layer_heat_map(
        rows,
        title=heading,
        number_format=number_format,
        description=f"{heading} by block and kind of module",
        **options,
    )
    return Figure(key, heading, spec)


def _map_section(modules: Sequence[Row]) -> Section | None:
    if not modules:
        return None
    figures = [
        _figure(
            "map-directions", "directions for 90 %", modules, lambda m: m["directions_90"], "d"
        ),
        _figure("map-effective", "effective rank", modules, lambda m: m["effective_rank"], ".1f"),
        _figure("map-norm", "norm of the change", modules, lambda m: m["norm"], ".2~e"),
        _figure("map-balance", "||B|| / ||A||", modules, lambda m: m.get("balance"), ".2~r"),
    ]
    figures = [figure for figure in figures if figure is not None]
    figures.append(Figure("spectra", "Spectra", _spectra(modules)))
    caption = (
        "Each cell is a module. Directions for 90 %: how many singular directions hold that share"
        " of the squared norm. Effective rank: exp of the entropy of the squared singular values."
    )
    grid = FigureGrid(caption, tuple(figures), (_kind_table(modules),), broad=True)
    lead = "Where the change is, and in how many directions it lies."
    return Section("maps", "By layer and module", "Maps", (grid,), lead)


def _spectra(modules: Sequence[Row]) -> dict[str, Any]:
    stride = -(-len(modules) // MAX_LINES)
    rows = [
        {"module": module["module"], "index": index, "value": round(value / values[0], 5)}
        for module in modules[::stride]
        if (values := module["singular_values"]) and values[0] > 0
        for index, value in enumerate(values, start=1)
    ]
    return heatmaps.spectrum_chart(rows, "Singular values of every module, relative to the first")


def _kind_table(modules: Sequence[Row]) -> Table:
    kinds: dict[str, list[Row]] = {}
    for module in modules:
        kinds.setdefault(module["kind"], []).append(module)
    total = sum(module["norm"] ** 2 for module in modules) or 1.0
    rows = [{"kind": kind, "group": group} for kind, group in kinds.items()]

    def mean_of(name: str) -> Callable[[Row], Cell]:
        return lambda row: Cell(formats.number(_mean(m[name] for m in row["group"]), 1))

    columns = (
        (Column("kind of module", numeric=False), lambda row: Cell(row["kind"])),
        (Column("modules"), lambda row: Cell(formats.exact(len(row["group"])))),
        (
            Column("share of the change"),
            lambda row: Cell(formats.percent(sum(m["norm"] ** 2 for m in row["group"]) / total)),
        ),
        (Column("directions for 90 %", "mean"), mean_of("directions_90")),
        (Column("effective rank", "mean"), mean_of("effective_rank")),
        (Column("stable rank", "mean"), mean_of("stable_rank")),
        (
            Column("size"),
            lambda row: Cell(formats.data_size(sum(m["num_bytes"] for m in row["group"]))),
        ),
    )
    return table_of("By kind of module.", rows, columns, wide=False)


def _base_section(modules: Sequence[Row]) -> Section | None:
    known = [module for module in modules if module.get("base")]
    if not known:
        return None
    percent = ".2~%"
    figures = [
        _figure(
            "map-relative",
            "||delta|| / ||W||",
            known,
            lambda m: m["base"]["relative_norm"],
            percent,
        ),
        _figure(
            "map-spectral",
            "first singular value / the base's",
            known,
            lambda m: m["base"]["relative_spectral_norm"],
            percent,
        ),
        _figure(
            "map-amplification",
            "amplification",
            known,
            lambda m: m["base"]["amplification"],
            ".2~r",
            logarithmic=True,
        ),
        _figure("map-intruders", "intruders", known, lambda m: m["base"]["intruders"], "d"),
        _figure(
            "map-onset",
            "first intruder at so many times the delta",
            known,
            lambda m: m["base"]["onset_scale"],
            ".2~r",
            logarithmic=True,
        ),
    ]
    caption = (
        "Amplification: the norm of the delta over what the base does along the delta's own"
        " directions (Hu et al. 2021, table 7). Intruders: of the adapted weight's first ten"
        " directions those that no direction of the base is near to (cosine below 0.5) and the"
        " delta is (Shuttleworth et al. 2024). The last map estimates how many times the delta it"
        " takes, from the base's spectrum."
    )
    strongest = sorted(known, key=lambda m: -m["base"]["relative_norm"])[:12]

    def number_of(name: str, decimals: int) -> Callable[[Row], Cell]:
        return lambda module: Cell(formats.number(module["base"][name], decimals))

    columns = (
        (Column("module", numeric=False), lambda module: Cell(module["module"])),
        (
            Column("||delta|| / ||W||"),
            lambda module: Cell(formats.percent(module["base"]["relative_norm"], 2)),
        ),
        (Column("||U'WV||", "delta's directions"), number_of("along_delta", 3)),
        (Column("||U'WV||", "base's first"), number_of("along_own", 2)),
        (Column("||U'WV||", "random"), number_of("along_random", 3)),
        (Column("amplification"), number_of("amplification", 2)),
        (Column("intruders"), lambda module: Cell(formats.exact(module["base"]["intruders"]))),
    )
    table = table_of("The modules that change most.", strongest, columns, wide=False)
    grid = FigureGrid(caption, tuple(f for f in figures if f is not None), (table,), broad=True)
    return Section("base", "Against the base", "Base", (grid,))


def _module_section(modules: Sequence[Row]) -> Section | None:
    if not modules:
        return None
    columns = (
        (Column("module", numeric=False), lambda m: Cell(m["module"], title=" ".join(m["notes"]))),
        (Column("out x in"), lambda m: Cell(" x ".join(map(str, m["shape"])))),
        (Column("rank"), lambda m: Cell(formats.plain(m["rank"]))),
        (Column("90 %", "directions"), lambda m: Cell(formats.exact(m["directions_90"]))),
        (Column("99 %", "directions"), lambda m: Cell(formats.exact(m["directions_99"]))),
        (Column("effective rank"), lambda m: Cell(formats.number(m["effective_rank"], 1))),
        (Column("stable rank"), lambda m: Cell(formats.number(m["stable_rank"], 1))),
        (Column("norm"), lambda m: Cell(f"{m['norm']:.3g}")),
        (Column("first value"), lambda m: Cell(f"{m['spectral_norm']:.3g}")),
        (Column("||B|| / ||A||"), lambda m: Cell(formats.number(m["balance"], 2))),
    )
    notes = sorted({note for module in modules for note in module["notes"]})
    table = table_of("", modules, columns, note=" ".join(notes))
    return Section("modules", "Every module", "Modules", (table,))


def _other_section(others: Sequence[Row]) -> Section | None:
    if not others:
        return None
    columns = (
        (Column("tensor", numeric=False), lambda other: Cell(other["name"])),
        (Column("what it is", numeric=False), lambda other: Cell(other["role"])),
        (Column("shape"), lambda other: Cell(" x ".join(map(str, other["shape"])))),
        (Column("size"), lambda other: Cell(formats.data_size(other["num_bytes"]))),
        (
            Column("||own - base|| / ||base||"),
            lambda other: Cell(formats.percent(other["relative_change"], 2), detail=other["note"]),
        ),
    )
    lead = "Replaced whole, so that a spectrum says nothing of them."
    return Section("others", "Other tensors", "Others", (table_of("", others, columns),), lead)


def _mean(values: Any) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0
