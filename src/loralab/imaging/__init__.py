"""Image models: a small denoiser with style adapters, sampled by route, judged by classifiers."""

from loralab.imaging.base import DIGITS_BASE, BaseRecipe, digits_base, is_trained
from loralab.imaging.denoiser import (
    STYLE_TARGETS,
    Denoiser,
    build_denoiser,
    load_denoiser,
    save_denoiser,
)
from loralab.imaging.denoising import Denoising, DenoisingTask
from loralab.imaging.digits import Digits, ImageRow, load_digits, stack
from loralab.imaging.grid import Sheet, Strip, pillow, write_grid
from loralab.imaging.judging import (
    LOOKS,
    FrechetDistance,
    Judge,
    Judges,
    base_is_no_style,
    digit_accuracy,
    digits_seen,
    frechet_distance,
    looks_seen,
    style_accuracy,
    style_shares,
    train_judges,
)
from loralab.imaging.sampling import sample_images
from loralab.imaging.styles import PLAIN, STYLES, styled

__all__ = [
    "DIGITS_BASE",
    "LOOKS",
    "PLAIN",
    "STYLES",
    "STYLE_TARGETS",
    "BaseRecipe",
    "Denoiser",
    "Denoising",
    "DenoisingTask",
    "Digits",
    "FrechetDistance",
    "ImageRow",
    "Judge",
    "Judges",
    "Sheet",
    "Strip",
    "base_is_no_style",
    "build_denoiser",
    "digit_accuracy",
    "digits_base",
    "digits_seen",
    "frechet_distance",
    "is_trained",
    "load_denoiser",
    "load_digits",
    "looks_seen",
    "pillow",
    "sample_images",
    "save_denoiser",
    "stack",
    "style_accuracy",
    "style_shares",
    "styled",
    "train_judges",
    "write_grid",
]
