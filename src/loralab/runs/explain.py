"""`loralab explain`: the page that teaches, with the reader's own adapter where one is given."""

from pathlib import Path
from typing import Any

from loralab.events import Listener, ignore
from loralab.reports import write_explanation
from loralab.runs.folder import refuse_other_file
from loralab.runs.inspect import inspect


def explain(
    output: str | Path, source: str | Path | None = None, *, listen: Listener = ignore
) -> dict[str, Any]:
    """Write the page to `output`; `source` is an adapter or a run. Returns where it is.

    Raises `AdapterError` or `ConfigError` for a source that is no adapter, `OutputError` for a
    place that cannot be written.
    """
    refuse_other_file(Path(output))
    xray = None if source is None else inspect(source, listen=listen)
    write_explanation(output, xray=xray)
    return {"page": str(output), "adapter": None if source is None else str(source)}
