"""Images from noise: deterministic DDIM, one seed an image, an adapter or a mix for each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loralab import adapters
from loralab.errors import RouteError
from loralab.imaging.denoiser import Denoiser, Images
from loralab.models import evaluating

Entry = str | None | Mapping[str, float | int]


def sample_images(
    denoiser: Denoiser,
    labels: Sequence[int],
    *,
    seeds: Sequence[int],
    routes: Sequence[Entry] | None = None,
    num_steps: int = 12,
    guidance: float | int = 2.0,
) -> Images:
    """One image for each label, in [-1, 1], by DDIM (Song et al. 2020, 2010.02502; eta 0).

    seeds: one for each image; with its label and route a seed decides the image, whatever else is
        in the batch (up to the rounding of batched kernels).
    routes: which adapter each image uses: a name, None (the base), or {name: weight}; without it
        the route that is open stays in force.
    guidance: how far each step moves from what any class would be towards the asked one
        (2207.12598); 1 is none and halves the work.

    Raises `RouteError` where labels, seeds and routes are not equally many.
    """
    counts = {"labels": len(labels), "seeds": len(seeds)}
    if routes is not None:
        counts["routes"] = len(routes)
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise RouteError(f"images need as many of each: {said}", "give one of each an image.")
    device = denoiser.device
    asked = torch.tensor(labels, device=device)
    images = _noise(denoiser, seeds).to(device)
    scheduler = _ddim(denoiser, num_steps)
    with evaluating(denoiser.unet), torch.no_grad(), _routed(denoiser, routes, guidance != 1):
        for timestep in scheduler.timesteps:
            said = _guided(denoiser, images, timestep, asked, guidance)
            images = scheduler.step(said, timestep, images, return_dict=False)[0]
    return images.clamp(-1, 1)


def _noise(denoiser: Denoiser, seeds: Sequence[int]) -> Images:
    """Where each image starts: drawn on the CPU from its own seed."""
    side = denoiser.image_size
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(1, side, side, generator=each) for each in generators])


def _ddim(denoiser: Denoiser, num_steps: int) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = denoiser.scheduler.config
    scheduler: Any = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps, device=denoiser.device)
    return scheduler


@contextmanager
def _routed(denoiser: Denoiser, routes: Sequence[Entry] | None, guided: bool) -> Iterator[None]:
    """The routes in force; guidance runs every row twice, so each route stands twice."""
    if routes is None:
        yield
        return
    doubled = [*routes, *routes] if guided else list(routes)
    same = all(entry == doubled[0] for entry in doubled)
    with adapters.use(denoiser.unet, doubled[0] if same else doubled):
        yield


def _guided(
    denoiser: Denoiser,
    images: Images,
    timestep: Int[Tensor, ""],
    labels: Int[Tensor, "rows"],
    guidance: float | int,
) -> Images:
    if guidance == 1:
        return denoiser.predict(images, timestep.expand(len(images)), labels)
    none = torch.full_like(labels, denoiser.none_class)
    said = denoiser.predict(
        torch.cat([images, images]),
        timestep.expand(2 * len(images)),
        torch.cat([labels, none]),
    )
    asked, unasked = said.chunk(2)
    return unasked + guidance * (asked - unasked)
