"""`loralab fetch`: the offline catalogue."""

from collections.abc import Sequence
from typing import Any

from loralab.catalogue import ENTRIES, fetch, find_entry
from loralab.events import Listener, Note, Phase, Progress, ignore

MIB = 2**20


def catalogue() -> list[dict[str, Any]]:
    """Every entry: name, kind, size of its package, licence, what it is, where it comes from."""
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
    """Bring entries into the cache, checked; the folder of each by name.

    Raises `FetchError` for an unknown name (before anything is fetched), without a network, or
    for wrong bytes.
    """
    wanted = list(ENTRIES) if everything else list(dict.fromkeys(names))
    entries = [find_entry(name) for name in wanted]
    folders = {}
    for entry in entries:
        listen(Phase(f"fetching {entry.name}", entry.archive.num_bytes, "bytes"))
        if entry.kind == "model":
            folders[entry.name] = str(_model_folder(entry.name, listen))
        else:
            folders[entry.name] = str(fetch(entry.name, progress=_progress(listen)))
        listen(Note(f"{entry.name} is whole"))
    return folders


def _model_folder(name: str, listen: Listener) -> Any:
    """Models are made ready to load: a GGUF is converted once."""
    from loralab.models import model_folder

    fetch(name, progress=_progress(listen))
    return model_folder(name)


def _progress(listen: Listener) -> Any:
    return lambda _what, done, _total: listen(Progress(done))
