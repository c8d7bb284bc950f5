"""Images of the class that a subject belongs to, drawn by the base itself.

Trained beside the subject's images, they keep the class what it was (prior preservation in
DreamBooth, Ruiz et al. 2022, 2208.12242).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from loralab.catalogue import cache_folder
from loralab.files import replacing
from loralab.imaging.latent.base import LatentBase
from loralab.imaging.latent.drawing import Drawing, draw_image, to_bytes


def class_images(
    base: LatentBase,
    unet: nn.Module,
    prompt: str,
    count: int,
    drawing: Drawing,
    *,
    progress: Callable[[int], None] = lambda _done: None,
) -> Path:
    """The folder in the user's cache with `count` images that the base draws of `prompt`.

    Image n has seed n, so a folder that is not full is filled up. `unet` must not be in training.
    Raises `OutputError` where the cache cannot be written.
    """
    folder = cache_folder() / "class-images" / _key(base, prompt, count, drawing)
    missing = [n for n in range(count) if not _file(folder, n).is_file()]
    if missing:
        with base.drawing(unet) as pipeline:
            for number in missing:
                image = draw_image(pipeline, prompt, number, drawing)
                with replacing(_file(folder, number)) as aside:
                    aside.write_bytes(to_bytes(image))
                progress(number + 1)
    return folder


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _key(base: LatentBase, prompt: str, count: int, drawing: Drawing) -> str:
    parts = [base.hash_of(*base.family.weights), str(base.dtype), prompt, count, drawing.facts()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
