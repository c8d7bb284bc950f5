"""Styles as deterministic transforms of images: what style adapters learn and judges know."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loralab.errors import ConfigError, nearest
from loralab.imaging.digits import ImageRow

Image = Float[Tensor, "channels height width"]
PLAIN = "plain"

_SLANT = 0.35  # columns a row moves, for each row above or below the middle
_GRAIN_DARKNESS, _BOARD = 0.75, -0.45


def bold(image: Image) -> Image:
    """Fat, saturated strokes: every pixel takes the brightest of a round neighbourhood."""
    ink = _saturate(_ink(image), middle=0.6)[None]
    tall, wide = (
        functional.max_pool2d(ink, size, stride=1, padding=(size[0] // 2, size[1] // 2))
        for size in ((5, 3), (3, 5))
    )
    return torch.maximum(tall, wide)[0] * 2 - 1


def outline(image: Image) -> Image:
    """The contour alone, leaning to the right."""
    ink = _saturate(_slant(_ink(image)), middle=0.5)
    return (_grow(ink, 1) - _shrink(ink, 1)).clamp(0, 1) * 2 - 1


def chalk(image: Image) -> Image:
    """Broken strokes with the grain of a blackboard. The grain is the image's own: its pixels
    seed it, so that a model must learn what grain looks like instead of one mask."""
    generator = torch.Generator().manual_seed(_seed(image))
    coarse, dust = torch.rand(2, *image.shape, generator=generator)
    grain = _streaks(coarse)
    ink = _saturate(_ink(image), middle=0.35) * (1 - _GRAIN_DARKNESS * (grain > 0.6))
    board = _BOARD + 0.15 * dust
    return (board + ink * (1 - board)).clamp(-1, 1)


STYLES: dict[str, Callable[[Image], Image]] = {"bold": bold, "outline": outline, "chalk": chalk}


def styled(rows: Sequence[ImageRow], style: str) -> tuple[ImageRow, ...]:
    """The rows in that style ("plain" leaves them). Raises `ConfigError` for an unknown style."""
    if style == PLAIN:
        return tuple(rows)
    if style not in STYLES:
        raise ConfigError(f"unknown style {style!r}", nearest(style, (*STYLES, PLAIN)))
    transform = STYLES[style]
    return tuple(replace(row, id=f"{row.id}/{style}", pixels=transform(row.pixels)) for row in rows)


def _ink(image: Image) -> Image:
    return (image + 1) / 2


def _saturate(ink: Image, middle: float) -> Image:
    """A soft threshold: edges stay smooth, strokes become full."""
    return torch.sigmoid((ink - middle) * 12)


def _grow(ink: Image, radius: int) -> Image:
    return functional.max_pool2d(ink, 2 * radius + 1, stride=1, padding=radius)


def _shrink(ink: Image, radius: int) -> Image:
    return -_grow(-ink, radius)


def _slant(ink: Image) -> Image:
    """Sheared to the right about the middle row."""
    shear = torch.tensor([[[1.0, _SLANT, 0.0], [0.0, 1.0, 0.0]]])
    grid = functional.affine_grid(shear, [1, *ink.shape], align_corners=False)
    return functional.grid_sample(ink[None], grid, align_corners=False)[0]


def _streaks(noise: Image) -> Image:
    """Noise smeared along the diagonal, spread again over [0, 1] by its ranks."""
    smeared = sum(torch.roll(noise, (shift, -shift), dims=(-2, -1)) for shift in range(3))
    assert isinstance(smeared, Tensor)
    ranks = smeared.flatten().argsort().argsort().float()
    return (ranks / (ranks.numel() - 1)).reshape(noise.shape)


def _seed(image: Image) -> int:
    raw = image.contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> 1
