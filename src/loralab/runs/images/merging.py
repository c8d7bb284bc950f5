"""`loralab merge` of an image model's adapter: a plain diffusers folder with a certificate."""

from pathlib import Path
from typing import Any, cast

import torch

from loralab.adapters import load_adapter, merge
from loralab.events import Listener, Phase
from loralab.imaging import Denoiser, load_denoiser, save_denoiser
from loralab.imaging.latent import is_pipeline, open_base
from loralab.runs.folder import MANIFEST, open_run
from loralab.runs.images.evaluating import base_of
from loralab.training import ADAPTER_NAME

CERTIFICATE = "merge_certificate.json"


def image_base(adapter: Path, base: str | None, listen: Listener) -> Path | None:
    """The folder of the image model that the adapter's folder belongs to, where it is one's.

    base: as it was named; without a name it is that of the run in which the adapter lies.
    """
    if base is not None:
        return Path(base) if (Path(base) / "unet").is_dir() else None
    if not (adapter.parent / MANIFEST).is_file():
        return None
    run = open_run(adapter.parent)
    if run.config.model.task != "image":
        return None
    run.check_finished()
    return base_of(run, listen)


def merge_image_adapter(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    limit: float | None,
    force: bool,
    listen: Listener,
) -> dict[str, Any]:
    """Write `base` with the adapter in its weights to the new folder `output`; the certificate.

    Raises `AdapterError` where the adapter is another base's, or where more than `limit` of its
    effect would be lost and not `force`.
    """
    listen(Phase("merging"))
    if is_pipeline(base):
        pipeline = open_base(str(base), device=torch.device("cpu"))
        unet = pipeline.unet()
        load_adapter(unet, adapter, ADAPTER_NAME)
        merged, certificate = merge(unet, ADAPTER_NAME, limit=limit, force=force)
        document = certificate.to_dict()
        pipeline.save_with(merged, output, {CERTIFICATE: document})
        return document
    denoiser = load_denoiser(base)
    load_adapter(denoiser.unet, adapter, ADAPTER_NAME)
    merged, certificate = merge(denoiser.unet, ADAPTER_NAME, limit=limit, force=force)
    document = certificate.to_dict()
    plain = Denoiser(cast(Any, merged), denoiser.scheduler)
    save_denoiser(plain, output, {CERTIFICATE: document})
    return document
