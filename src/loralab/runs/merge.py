"""`loralab merge`: an adapter inside plain weights, with a certificate of what that cost."""

from pathlib import Path
from typing import Any

from loralab.adapters import merge as merge_into, merge_checkpoint, save_merged
from loralab.errors import ConfigError, RunError
from loralab.events import Listener, Phase, ignore
from loralab.models import load_tokenizer
from loralab.runs.evaluate import trained_model
from loralab.runs.folder import MANIFEST, open_run, refuse_existing


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    limit: float | None = None,
    force: bool = False,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Merge a finished run's adapter, or an adapter folder into the checkpoint folder `base`.

    A run's adapter is measured on the probes that were stored with it, so that the certificate says
    how much of its effect is kept. A checkpoint is merged shard by shard, never whole in
    memory. Returns the certificate. Raises `OutputError` where `output` exists, `AdapterError`
    where more than `limit` of the effect would be lost and not `force`.
    """
    source, output = Path(source), Path(output)
    refuse_existing(output)
    if not (source / MANIFEST).is_file():
        if base is None:
            raise ConfigError(
                f"{source} is no run, so its base is not known",
                "name the base's folder: loralab merge ADAPTER --base FOLDER --output FOLDER.",
            )
        listen(Phase("merging shard by shard"))
        certificate = merge_checkpoint(base, source, output, limit=limit, force=force)
        return certificate.to_dict()
    return _merge_run(source, output, limit, force, listen)


def _merge_run(
    source: Path, output: Path, limit: float | None, force: bool, listen: Listener
) -> dict[str, Any]:
    run = open_run(source)
    if run.artifact.name != "adapter":
        raise RunError(
            f"{source} was trained by {run.config.method.kind} and has no adapter to merge",
            f"its weights are plain already: {run.artifact}.",
        )
    listen(Phase("merging"))
    model, route = trained_model(run, device="cpu")
    assert route is not None  # its artifact is an adapter
    merged, certificate = merge_into(model, route, limit=limit, force=force)
    save_merged(merged, certificate, output, load_tokenizer(run.config.model.name))
    return certificate.to_dict()
