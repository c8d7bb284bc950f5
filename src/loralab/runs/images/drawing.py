"""`loralab generate RUN "a prompt" --image FILE`: an image in the style of a run's own images."""

import time
from pathlib import Path
from typing import Any

import torch

from loralab.adapters import load_adapter
from loralab.errors import DataError
from loralab.events import Listener, Note, Phase
from loralab.files import replacing
from loralab.imaging.latent import draw, open_base, to_bytes
from loralab.runs.folder import Run
from loralab.runs.images.evaluating import base_of
from loralab.runs.images.latent import ADAPTER
from loralab.runs.images.samples import drawing_of
from loralab.training import choose_device


def draw_prompt(
    run: Run, prompt: str, image: Path, *, seed: int, listen: Listener
) -> dict[str, Any]:
    """Draw the prompt with the run's adapter and its settings, as a PNG of its own size.

    Raises `DataError` for an empty prompt, `AdapterError` where the base is another than the one
    that was trained on, `OutputError` where the PNG cannot be written.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty", "say what the image shows.")
    listen(Phase("loading the model", None, "files"))
    config = run.config
    base = open_base(
        str(base_of(run, listen)),
        dtype=getattr(torch, config.model.dtype),
        device=choose_device(config.training.device),
    )
    unet = base.unet()
    load_adapter(unet, run.folder / ADAPTER, ADAPTER)
    listen(Phase("drawing an image", None, "steps"))
    began = time.perf_counter()
    [[drawn]] = draw(base, unet, [prompt], drawing_of(config.images), routes=[ADAPTER], seed=seed)
    seconds = time.perf_counter() - began
    with replacing(image) as aside:
        aside.write_bytes(to_bytes(drawn))
    listen(Note(f"an image in {seconds:.1f} s"))
    drawn_as = {"prompt": prompt, "route": {ADAPTER: 1.0}, "seed": seed}
    return {"image": str(image), "images": [drawn_as], "seconds": round(seconds, 3)}
