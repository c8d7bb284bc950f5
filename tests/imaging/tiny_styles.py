"""A tiny denoiser and a recipe of seconds over it."""

from pathlib import Path
from typing import Any

from loralab.config import RunConfig, load_config
from loralab.imaging import build_denoiser, save_denoiser

OVERRIDES = (
    "model.dtype=float32",
    'images.styles=["bold", "chalk"]',
    "images.judged_images=0",
    "images.sampling_steps=2",
    "method.rank=2",
    "training.max_steps=6",
    "training.checkpoint_steps=2",
    "training.threads=1",
    "training.device=cpu",
    "data.train_rows=60",
)


def tiny_base(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder of an untrained denoiser."""
    save_denoiser(build_denoiser(channels=(16, 16), seed=seed), folder)
    return folder


def recipe(base: Path | str, *overrides: str) -> RunConfig:
    """The shipped recipe made small; `overrides` as on the command line."""
    named: tuple[Any, ...] = (f'model.name="{base}"',)
    return load_config("digits-styles", (*OVERRIDES, *named, *overrides))
