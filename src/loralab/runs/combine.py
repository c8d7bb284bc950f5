"""`loralab combine`: several adapters as one, through their factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.adapters import combination, content_hash, read_adapter, write_adapter
from loralab.errors import ConfigError
from loralab.events import Listener, Note, ignore
from loralab.runs.folder import MANIFEST, open_run, refuse_existing
from loralab.runs.workbench import base_model


def combine(
    weights: Mapping[str, float],
    output: str | Path,
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Write the combination of adapters (folders or runs, each with its weight) to `output`.

    Heads and other whole tensors become the base plus the weighted sum of their changes where the
    first source is a run (its base is known), else their weighted mean. Returns the new adapter's
    rank, hash, and each module's relative error. Raises `AdapterError` with everything that does
    not fit, `OutputError` where `output` exists.
    """
    output = Path(output)
    refuse_existing(output)
    folders = [_adapter_folder(Path(source)) for source in weights]
    found = combination(
        [read_adapter(folder) for folder in folders],
        list(weights.values()),
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        base=_base(Path(next(iter(weights)))),
        seed=seed,
    )
    for note in found.notes:
        listen(Note(note))
    write_adapter(found.adapter, output)
    return {
        "adapter": str(output),
        "sha256": content_hash(found.adapter),
        "method": method,
        "weights": dict(weights),
        "largest_error": max(found.errors.values(), default=0.0),
        "errors": dict(found.errors),
        "notes": list(found.notes),
    }


def parse_weights(sources: tuple[str, ...]) -> dict[str, float]:
    """`path=0.7` or `path` (weight 1) -> weights by path. Raises `ConfigError`."""
    weights: dict[str, float] = {}
    for source in sources:
        path, equals, text = source.rpartition("=")
        try:
            path, weight = (path, float(text)) if equals else (source, 1.0)
        except ValueError:
            raise ConfigError(
                f"the weight in {source!r} is no number", "write PATH=WEIGHT, such as runs/a=0.7."
            ) from None
        if path in weights:
            raise ConfigError(f"{path} is named twice", "add its weights up yourself.")
        weights[path] = weight
    return weights


def _adapter_folder(source: Path) -> Path:
    return open_run(source).artifact if (source / MANIFEST).is_file() else source


def _base(source: Path) -> Any:
    return base_model(open_run(source).config) if (source / MANIFEST).is_file() else None
