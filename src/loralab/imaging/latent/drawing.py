"""Images of prompts, drawn by the pipeline's own sampler; a seed decides an image."""

import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab import adapters
from loralab.imaging.grid import pillow
from loralab.imaging.latent.base import LatentBase
from loralab.imaging.latent.conditioning import is_cut
from loralab.imaging.latent.pictures import to_pixels
from loralab.models import evaluating

log = logging.getLogger("loralab")

Image = Float[Tensor, "3 side side"]


@dataclass(frozen=True)
class Drawing:
    """How images are drawn. guidance: of classifier-free guidance (2207.12598); 1 is none."""

    resolution: int
    num_steps: int = 30
    guidance: float | int = 7.5
    negative_prompt: str = ""

    def facts(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)


def draw(
    base: LatentBase,
    unet: nn.Module,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    routes: Sequence[str | None],
    seed: int = 0,
) -> list[list[Image]]:
    """For each prompt an image along each route (None: the base), in [-1, 1].

    Every image of a prompt begins with the same noise; the next prompt has the next seed. Training
    may go on afterwards: modes and random streams are as before.
    """
    with base.drawing(unet) as pipeline:
        for prompt in prompts:
            if is_cut(pipeline, prompt):
                log.warning("the base reads only the first tokens of the prompt %r", prompt)
        return [
            [_along(pipeline, unet, prompt, seed + number, drawing, route) for route in routes]
            for number, prompt in enumerate(prompts)
        ]


@torch.no_grad()
def draw_image(pipeline: Any, prompt: str, seed: int, drawing: Drawing) -> Image:
    """One image by a whole pipeline, along the route that is open on its UNet."""
    with evaluating(pipeline.unet):
        latents = pipeline(
            prompt,
            height=drawing.resolution,
            width=drawing.resolution,
            num_inference_steps=drawing.num_steps,
            guidance_scale=drawing.guidance,
            negative_prompt=drawing.negative_prompt or None,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
    # the VAE is in float32, whatever the UNet is in
    pixels = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
    return pixels[0].clamp(-1, 1).cpu()


def to_bytes(image: Image) -> bytes:
    """The image as a PNG file."""
    values = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    pillow().Image.fromarray(values.contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def from_bytes(data: bytes) -> Image:
    """The image in a PNG file, as `to_bytes` wrote it."""
    return to_pixels(pillow().Image.open(io.BytesIO(data)).convert("RGB"))


def _along(
    pipeline: Any, unet: nn.Module, prompt: str, seed: int, drawing: Drawing, route: str | None
) -> Image:
    with adapters.use(unet, route):
        return draw_image(pipeline, prompt, seed, drawing)
