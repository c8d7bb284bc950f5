"""A style of one's own images: a Stable Diffusion base, one adapter, a folder with captions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import extract
from loralab.config import DIGITS_ONLY, RunConfig
from loralab.data import sample
from loralab.errors import ConfigError
from loralab.events import Listener, Note, Phase, Progress
from loralab.imaging.formats import write_image_adapter
from loralab.imaging.latent import (
    LatentBase,
    LatentDenoisingTask,
    LatentRow,
    Picture,
    class_images,
    encode_captions,
    encode_pictures,
    latent_rows,
    open_base,
    read_pictures,
    with_prior,
)
from loralab.runs.images.samples import Samples, drawing_of
from loralab.runs.images.subject import Judgement, foreign_keys
from loralab.training import choose_device

ADAPTER = "adapter"
PORTABLE_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers' `load_lora_weights` looks for in a folder."""


@dataclass(frozen=True)
class LatentStyle:
    """An `ImageSubject`: images with captions as latents, and the UNet that learns them."""

    config: RunConfig
    latent_base: LatentBase
    unet: nn.Module
    images: Sequence[LatentRow]
    facts: Mapping[str, Any]

    @property
    def model(self) -> nn.Module:
        """The UNet."""
        return self.unet

    @property
    def base(self) -> Path:
        """The pipeline's folder."""
        return self.latent_base.folder

    @property
    def task(self) -> LatentDenoisingTask:
        """To say what noise was added to a latent, given its caption."""
        images = self.config.images
        return LatentDenoisingTask(
            self.latent_base.schedule,
            scaling=self.latent_base.scaling,
            min_snr_gamma=images.min_snr_gamma,
            prior_weight=images.prior_weight,
        )

    @property
    def rows(self) -> Mapping[str, Sequence[LatentRow]]:
        """One adapter, named as in runs of language models."""
        return {ADAPTER: self.images}

    @property
    def example(self) -> str:
        """A prompt that the style can be tried on."""
        return next(iter(self.config.images.validation_prompts), self.images[0].caption)

    def watch(self, folder: Path, step: int, listen: Listener) -> None:
        """Draw the validation prompts where the settings say so."""
        every = self.config.images.sample_steps
        if every is not None and step % every == 0:
            self._samples(folder).keep(step)
            listen(Note(f"step {step}: images of the validation prompts in samples/"))

    def export(self, folder: Path) -> None:
        """The adapter as a file that diffusers' `load_lora_weights` takes, in its PEFT folder."""
        write_image_adapter(extract(self.unet, ADAPTER), folder / ADAPTER / PORTABLE_FILE)

    def judge(self, folder: Path, listen: Listener) -> Judgement:
        """Images of the validation prompts: the base's, those of the way, the adapter's."""
        return self._samples(folder).judge(listen)

    def _samples(self, folder: Path) -> Samples:
        return Samples(self.latent_base, self.unet, ADAPTER, self.config.images, folder)


def open_latent_style(config: RunConfig, listen: Listener, base: Path | None = None) -> LatentStyle:
    """Check the settings; get the base, the images and, where asked for, images of their class.

    Latents and class images are kept in the user's cache. Errors as `open_subject`, and `DataError`
    for a folder of images with anything wrong in it.
    """
    _check(config)
    images = config.images
    device = choose_device(config.training.device)
    dtype = getattr(torch, config.model.dtype)
    listen(Phase("opening the base"))
    opened = open_base(str(base or config.model.name), dtype=dtype, device=device)
    opened.check_resolution(images.resolution)
    pictures = read_pictures(str(config.data.name), prompt=images.prompt)
    if config.data.train_rows is not None:
        chosen = {p.id for p in sample(pictures, config.data.train_rows, "train")}
        pictures = tuple(picture for picture in pictures if picture.id in chosen)
    own = _rows(opened, pictures, config, listen)
    unet: nn.Module | None = None
    priors: tuple[LatentRow, ...] = ()
    if _has_prior(config):
        if images.prior_folder is None:
            unet = opened.unet()
        priors = _rows(opened, _class_pictures(opened, unet, config, listen), config, listen)
    rows = with_prior(own, priors) if priors else own
    facts = _facts(config, own, priors)
    _say(facts, own, listen)
    return LatentStyle(config, opened, opened.unet() if unet is None else unet, rows, facts)


def _check(config: RunConfig) -> None:
    images, faults = config.images, foreign_keys(config, DIGITS_ONLY, "styles of digits")
    if config.data.name is None:
        faults.append("data.name is missing: the folder of images")
    if config.data.train is not None:
        faults.append(f"data.train is {config.data.train!r}; give the folder as data.name")
    if config.model.dtype == "float16":
        faults.append("model.dtype is 'float16', which has no loss scaling; set 'bfloat16'")
    if images.prior_prompt is None and images.prior_folder is not None:
        faults.append("images.prior_folder needs images.prior_prompt, the caption of its images")
    if images.sample_steps is not None and not images.validation_prompts:
        faults.append("images.sample_steps needs images.validation_prompts")
    if faults:
        raise ConfigError(
            "; ".join(faults), "the recipe stable-diffusion-style shows all settings."
        )


def _has_prior(config: RunConfig) -> bool:
    return config.images.prior_prompt is not None and config.images.prior_weight > 0


def _class_pictures(
    base: LatentBase, unet: nn.Module | None, config: RunConfig, listen: Listener
) -> tuple[Picture, ...]:
    images = config.images
    folder = images.prior_folder
    if folder is None:
        assert unet is not None and images.prior_prompt is not None
        listen(Phase("drawing images of the class", images.num_prior_images, "images"))
        folder = class_images(
            base,
            unet,
            images.prior_prompt,
            images.num_prior_images,
            drawing_of(images),
            progress=lambda done: listen(Progress(done)),
        )
    return read_pictures(folder, prompt=images.prior_prompt)


def _rows(
    base: LatentBase, pictures: Sequence[Picture], config: RunConfig, listen: Listener
) -> tuple[LatentRow, ...]:
    images = config.images
    listen(Phase("reading images", len(pictures), "images"))
    encoded = encode_pictures(
        base,
        pictures,
        images.resolution,
        skip_unreadable=images.skip_unreadable,
        progress=lambda done: listen(Progress(done)),
    )
    for fault in encoded.skipped:
        listen(Note(f"left out: {fault}", warning=True))
    kept = len(encoded.pictures) - encoded.num_computed
    listen(Note(f"{len(encoded.pictures)} images, the latents of {kept} of them from the cache"))
    conditioning = encode_captions(base, [picture.caption for picture in encoded.pictures])
    return latent_rows(encoded, conditioning, images.resolution)


def _facts(
    config: RunConfig, own: Sequence[LatentRow], priors: Sequence[LatentRow]
) -> dict[str, Any]:
    """Counts, and a hash of all that the rows are: a resumed run must find it equal."""
    content = json.dumps([[row.id, *row.content()] for row in (*own, *priors)])
    facts: dict[str, Any] = {
        "name": str(config.data.name),
        "train": len(own),
        "captions": len({row.caption for row in own}),
        "captions_cut": len({row.caption for row in own if row.conditioning.was_cut}),
        "resolution": config.images.resolution,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    return facts | ({"class_images": len(priors)} if priors else {})


def _say(facts: Mapping[str, Any], own: Sequence[LatentRow], listen: Listener) -> None:
    if facts["captions_cut"]:
        cut = [row.id for row in own if row.conditioning.was_cut]
        shown = ", ".join(cut[:3]) + (", ..." if len(cut) > 3 else "")
        listen(Note(f"{len(cut)} captions have more tokens than the base reads: {shown}", True))
    small = [row.id for row in own if min(row.latent.original) < row.resolution]
    if small:
        shown = ", ".join(small[:3]) + (", ..." if len(small) > 3 else "")
        listen(Note(f"{len(small)} images are smaller than images.resolution: {shown}", True))
