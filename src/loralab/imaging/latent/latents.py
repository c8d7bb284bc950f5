"""Images as latents: what the VAE says of each, computed once and kept in the user's cache."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralab.catalogue import cache_folder
from loralab.errors import DataError
from loralab.files import replacing
from loralab.imaging.latent.base import LatentBase
from loralab.imaging.latent.pictures import Framed, Picture, frame, unreadable

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

log = logging.getLogger("loralab")

_LAYOUT = 1  # raised when an image would be framed or stored otherwise
Places = Float[Tensor, "channels height width"]


@dataclass(frozen=True, eq=False)
class Latent:
    """The normal distribution that the VAE makes of an image, before any scaling.

    original, corner: as in `Framed`. key: hash of the image's bytes, the resolution and the VAE.
    """

    mean: Places
    std: Places
    original: tuple[int, int]
    corner: tuple[int, int]
    key: str


@dataclass(frozen=True)
class LatentCache:
    """Latents of one VAE at one resolution, a file each; shared by all runs of a user."""

    folder: Path
    resolution: int
    vae_hash: str

    def key(self, picture: Picture) -> str:
        """What the latent of an image depends on."""
        parts = [_LAYOUT, picture.digest, self.resolution, self.vae_hash]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def read(self, key: str) -> Latent | None:
        """A latent that was kept; None where there is none that is whole."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            tensors = load_file(file)
            mean, std, frame_ = (tensors[name] for name in ("mean", "std", "frame"))
            height, width, top, left = frame_.tolist()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            log.warning("%s is damaged and computed again (%s)", file, error)
            return None
        return Latent(mean, std, (height, width), (top, left), key)

    def write(self, latent: Latent) -> None:
        """Keep a latent. Raises `OutputError` where the cache cannot be written."""
        tensors = {
            "mean": latent.mean,
            "std": latent.std,
            "frame": torch.tensor([*latent.original, *latent.corner]),
        }
        with replacing(self._file(latent.key)) as aside:
            save_file(tensors, aside)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


@dataclass(frozen=True)
class EncodedPictures:
    """The latents of pictures that could be read, in their order; skipped: why others were not."""

    pictures: tuple[Picture, ...]
    latents: tuple[Latent, ...]
    num_computed: int
    skipped: tuple[str, ...]


def latent_cache(base: LatentBase, resolution: int) -> LatentCache:
    """The user's cache for this base's VAE. Raises `ModelError` for a resolution it cannot take."""
    base.check_resolution(resolution)
    return LatentCache(cache_folder() / "latents", resolution, base.hash_of("vae"))


def encode_pictures(
    base: LatentBase,
    pictures: Sequence[Picture],
    resolution: int,
    *,
    skip_unreadable: bool = False,
    progress: Callable[[int], None] = lambda _done: None,
) -> EncodedPictures:
    """Latents of the pictures: from the cache, or by the VAE, which is loaded where it is needed
    and released afterwards.

    Images go through the VAE one by one, so that a latent does not depend on its neighbours.
    Raises `DataError` that names every image that cannot be read, unless they are to be skipped.
    """
    cache = latent_cache(base, resolution)
    faults: list[str] = []
    found: dict[str, Latent] = {}
    vae, num_computed = None, 0
    for done, picture in enumerate(pictures, start=1):
        key = cache.key(picture)
        latent = cache.read(key)
        framed = _framed(picture, resolution, faults) if latent is None else None
        if framed is not None and (skip_unreadable or not faults):
            vae = vae or base.vae()
            latent = _encode(vae, framed, key)
            cache.write(latent)
            num_computed += 1
        if latent is not None:
            found[picture.name] = latent
        progress(done)
    del vae
    base.release()
    if faults and not (skip_unreadable and found):
        raise unreadable(faults)
    kept = tuple(picture for picture in pictures if picture.name in found)
    return EncodedPictures(kept, tuple(found[p.name] for p in kept), num_computed, tuple(faults))


@torch.no_grad()
def _encode(vae: "AutoencoderKL", framed: Framed, key: str) -> Latent:
    moments = vae.encode(framed.pixels[None].to(vae.device)).latent_dist  # type: ignore[union-attr]
    mean, std = (values[0].float().cpu().contiguous() for values in (moments.mean, moments.std))
    return Latent(mean, std, framed.original, framed.corner, key)


def _framed(picture: Picture, resolution: int, faults: list[str]) -> Framed | None:
    try:
        return frame(picture.path, resolution)
    except DataError as error:
        faults.append(error.cause.replace(picture.path.name, picture.name, 1))
        return None
