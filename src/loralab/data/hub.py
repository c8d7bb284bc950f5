"""Data sets of a hub, through the optional package `datasets`."""

import importlib
from collections.abc import Mapping
from typing import Any

from loralab.data.reading import Table
from loralab.data.splitting import SPLITS
from loralab.errors import DataError, FetchError, nearest

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def read_hub(name: str, wanted: Mapping[str, str | None]) -> dict[str, Table]:
    """The splits of hub data set `owner/name` or `owner/name:configuration`.

    `wanted` holds the hub's own names of splits where the settings give them.
    Raises `FetchError` where `datasets` is not installed, the hub is not reached or has no such
    data set; `DataError` for a split it does not have.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise FetchError(
            f"{name!r} is neither a catalogue name nor a local path; as a hub id it needs the "
            "package `datasets`, which is not installed",
            "pip install 'loralab[hub]', or give another data.name.",
        ) from None
    id, _, configuration = name.partition(":")
    try:
        loaded = library.load_dataset(id, configuration or None)
    except Exception as error:  # the library raises of many kinds, its own and its transports'
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FetchError(
            f"could not load {name!r} from the hub: {reason}",
            "check the id and the network, or give a catalogue name or local files.",
        ) from error
    return {split: _table(name, part, loaded[part]) for split, part in _parts(name, wanted, loaded)}


def _parts(
    name: str, wanted: Mapping[str, str | None], loaded: Mapping[str, Any]
) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    for split in SPLITS:
        given = wanted.get(split)
        if given is not None and given not in loaded:
            raise DataError(
                f"{name} has no split {given!r}; {nearest(given, loaded)}",
                f"set data.{split} to one of its splits.",
            )
        found = given or next((known for known in SPLIT_NAMES[split] if known in loaded), None)
        if found is not None:
            parts.append((split, found))
    return parts


def _table(name: str, part: str, rows: Any) -> Table:
    listed = rows.to_list()
    names = {
        column: tuple(feature.names)
        for column, feature in rows.features.items()
        if getattr(feature, "names", None)
    }
    return Table(
        f"{name} ({part})",
        tuple(rows.column_names),
        listed,
        range(1, len(listed) + 1),
        label_names=names,
    )
