"""`loralab fetch`: the offline catalogue, and bases that are trained here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.catalogue import ENTRIES, MADE, fetch, find_entry
from loralab.events import Listener, Note, Phase, Progress, ignore

MIB = 2**20


def catalogue() -> list[dict[str, Any]]:
    """Every entry: name, kind, size of its package, licence, what it is, where it comes from."""
    made = [
        {
            "name": entry.name,
            "kind": "model",
            "size": "trained here",
            "licence": entry.licence,
            "about": entry.description,
            "origin": entry.origin,
            "package": None,
            "sha256": None,
        }
        for entry in MADE.values()
    ]
    return [*_packaged(), *made]


def _packaged() -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "size": f"{entry.archive.num_bytes / MIB:.1f} MiB",
            "licence": entry.licence,
            "about": entry.description,
            "origin": entry.origin,
            "package": f"{entry.package} {entry.archive.version}",
            "sha256": entry.archive.sha256,
        }
        for entry in ENTRIES.values()
    ]


def fetch_entries(
    names: Sequence[str], *, everything: bool = False, listen: Listener = ignore
) -> dict[str, str]:
    """Bring entries into the cache, checked, or train them there; the folder of each by name.

    `everything` is what packages carry; a base that is trained here is named.

    Raises `FetchError` for an unknown name (before anything is fetched), without a network, or
    for wrong bytes.
    """
    wanted = list(ENTRIES) if everything else list(dict.fromkeys(names))
    entries = [find_entry(name) for name in wanted if name not in MADE]
    folders = {}
    for entry in entries:
        listen(Phase(f"fetching {entry.name}", entry.archive.num_bytes, "bytes"))
        if entry.kind == "model":
            folders[entry.name] = str(_model_folder(entry.name, listen))
        else:
            folders[entry.name] = str(fetch(entry.name, progress=_progress(listen)))
        listen(Note(f"{entry.name} is whole"))
    for name in wanted:
        if name in MADE:
            folders[name] = str(_trained_folder(name, listen))
    return {name: folders[name] for name in wanted}


def _trained_folder(name: str, listen: Listener) -> Path:
    from loralab.imaging import DIGITS_BASE, digits_base

    assert name == DIGITS_BASE  # the one entry that is made
    return digits_base(listen=listen)


def _model_folder(name: str, listen: Listener) -> Any:
    """Models are made ready to load: a GGUF is converted once."""
    from loralab.models import model_folder

    fetch(name, progress=_progress(listen))
    return model_folder(name)


def _progress(listen: Listener) -> Any:
    return lambda _what, done, _total: listen(Progress(done))
