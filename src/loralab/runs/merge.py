"""`loralab merge`: an adapter inside plain weights, with a certificate of what that cost."""

from pathlib import Path
from typing import Any

from loralab.adapters import (
    install,
    merge as merge_into,
    merge_checkpoint,
    read_adapter,
    save_merged,
)
from loralab.errors import ConfigError, RunError
from loralab.events import Listener, Phase, ignore
from loralab.measuring import check_probes
from loralab.models import load_model, load_tokenizer
from loralab.runs.evaluate import trained_model
from loralab.runs.folder import MANIFEST, open_run, refuse_existing
from loralab.runs.images.merging import image_base, merge_image_adapter
from loralab.runs.subject import task_of
from loralab.training import ADAPTER_NAME


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    limit: float | None = None,
    force: bool = False,
    measure: bool = False,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Merge a finished run's adapter, or an adapter folder into the checkpoint folder `base`.

    A run's adapter is measured on the probes that were stored with it, so that the certificate says
    how much of its effect is kept. A checkpoint is merged shard by shard, never whole in memory;
    with `measure` it is loaded, and measured on the adapter's probes too. Of an image model's run
    one adapter's folder is given; its base is the run's.

    Returns the certificate. Raises `OutputError` where `output` exists, `AdapterError` where more
    than `limit` of the effect would be lost and not `force`, or where probes show that the adapter
    does not do on this base what it did where it was trained.
    """
    source, output = Path(source), Path(output)
    refuse_existing(output)
    if not (source / MANIFEST).is_file():
        if (images := image_base(source, base, listen)) is not None:
            return merge_image_adapter(
                source, images, output, limit=limit, force=force, listen=listen
            )
        if base is None:
            raise ConfigError(
                f"{source} is no run, so its base is not known",
                "name the base's folder: loralab merge ADAPTER --base FOLDER --output FOLDER.",
            )
        if measure:
            return _merge_measured(source, base, output, limit, force, listen)
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


def _merge_measured(
    source: Path, base: str, output: Path, limit: float | None, force: bool, listen: Listener
) -> dict[str, Any]:
    adapter = read_adapter(source)
    if not adapter.probes:
        raise ConfigError(
            f"{source} holds no probes to measure a merge on",
            "leave --measure out, or merge the run that trained it.",
        )
    listen(Phase("merging"))
    model = load_model(base, **task_of(adapter))
    install(model, adapter, ADAPTER_NAME)
    check_probes(model, adapter.probes, ADAPTER_NAME)
    merged, certificate = merge_into(model, ADAPTER_NAME, limit=limit, force=force)
    save_merged(merged, certificate, output, load_tokenizer(base))
    return certificate.to_dict()
