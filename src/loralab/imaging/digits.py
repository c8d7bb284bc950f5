"""Real images that need no network: scikit-learn's 1,797 handwritten digits (8 x 8, 16 greys)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loralab.errors import ModelError

IMAGE_SIZE = 32
NUM_DIGITS = 10
_STROKE_SIZE = 24  # the digit itself; a margin of 4 leaves room for slants and bold strokes
_HELD_OUT_SHARE = 0.45


@dataclass(frozen=True, eq=False)
class ImageRow:
    """One image with its class, a `data.Row`: pixels in [-1, 1], channels first.

    `num_tokens` and `num_targets` are 1: an image is one unit of work and one loss.
    """

    id: str
    group: str
    label: int
    pixels: Float[Tensor, "channels height width"]
    num_tokens: int = 1
    num_targets: int = 1

    def content(self) -> list[str | int]:
        """What identifies the row: its class and the hash of its pixels."""
        raw = self.pixels.to(torch.float32).contiguous().numpy().tobytes()
        return [self.label, hashlib.sha256(raw).hexdigest()]


@dataclass(frozen=True)
class Digits:
    """The digits in a fixed split by the hash of their names.

    train: what generators learn from. held_out: what judges learn from and are checked on.
    """

    train: tuple[ImageRow, ...]
    held_out: tuple[ImageRow, ...]


def load_digits() -> Digits:
    """The 1,797 digits as 1 x 32 x 32 images. Raises `ModelError` without scikit-learn."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ModelError(
            "the handwritten digits come with scikit-learn, which is not installed",
            "install it: pip install 'loralab[images]'.",
        ) from error
    bunch: Any = load()
    images = enlarge(torch.tensor(bunch["images"], dtype=torch.float32) / 16)
    rows = [
        ImageRow(f"digits/{index:04d}", f"digits/{index:04d}", int(label), image)
        for index, (label, image) in enumerate(zip(bunch["target"], images, strict=True))
    ]
    train, held_out = split(rows, "held-out", _HELD_OUT_SHARE)
    return Digits(train, held_out)


def enlarge(images: Float[Tensor, "rows 8 8"]) -> Float[Tensor, "rows 1 32 32"]:
    """Greys in [0, 1] by bicubic interpolation to 24 x 24 inside a dark margin, in [-1, 1]."""
    grown = functional.interpolate(images[:, None], size=_STROKE_SIZE, mode="bicubic")
    margin = (IMAGE_SIZE - _STROKE_SIZE) // 2
    return functional.pad(grown.clamp(0, 1), (margin,) * 4) * 2 - 1


def split(
    rows: Sequence[ImageRow], purpose: str, share: float
) -> tuple[tuple[ImageRow, ...], tuple[ImageRow, ...]]:
    """Two disjoint parts, the second with about that share; a row's part is its name's alone."""
    chosen = {row.id for row in rows if _fraction(f"{purpose}:{row.id}") < share}
    return (
        tuple(row for row in rows if row.id not in chosen),
        tuple(row for row in rows if row.id in chosen),
    )


def _fraction(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def stack(rows: Sequence[ImageRow]) -> Float[Tensor, "rows channels height width"]:
    """The rows' pixels as one tensor."""
    return torch.stack([row.pixels for row in rows])
