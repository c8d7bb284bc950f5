"""Style adapters for real bases: Stable Diffusion trained on a folder of images with captions."""

from loralab.imaging.latent.base import LatentBase, open_base
from loralab.imaging.latent.conditioning import Conditioning, encode_captions
from loralab.imaging.latent.drawing import Drawing, draw, draw_image, from_bytes, to_bytes
from loralab.imaging.latent.families import is_pipeline
from loralab.imaging.latent.latents import (
    EncodedPictures,
    Latent,
    LatentCache,
    encode_pictures,
    latent_cache,
)
from loralab.imaging.latent.objective import LatentDenoising, LatentDenoisingTask
from loralab.imaging.latent.pictures import Framed, Picture, frame, read_pictures
from loralab.imaging.latent.prior import class_images
from loralab.imaging.latent.rows import LatentRow, latent_rows, with_prior
from loralab.imaging.latent.targets import ATTENTION, CONVOLUTIONS, FEED_FORWARD, PROJECTIONS

__all__ = [
    "ATTENTION",
    "CONVOLUTIONS",
    "FEED_FORWARD",
    "PROJECTIONS",
    "Conditioning",
    "Drawing",
    "EncodedPictures",
    "Framed",
    "Latent",
    "LatentBase",
    "LatentCache",
    "LatentDenoising",
    "LatentDenoisingTask",
    "LatentRow",
    "Picture",
    "class_images",
    "draw",
    "draw_image",
    "encode_captions",
    "encode_pictures",
    "frame",
    "from_bytes",
    "is_pipeline",
    "latent_cache",
    "latent_rows",
    "open_base",
    "read_pictures",
    "to_bytes",
    "with_prior",
]
