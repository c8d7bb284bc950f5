"""Images side by side: sheets of named strips, for a page or as one PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import ModelError
from loralab.files import replacing

_GAP, _LABEL_HEIGHT, _LABEL_WIDTH = 2, 14, 72  # labels are wider where names are


@dataclass(frozen=True, eq=False)
class Strip:
    """Images in a row; grey or RGB, in [-1, 1]. detail: stands smaller below the label."""

    label: str
    images: Float[Tensor, "count channels height width"]
    detail: str = ""

    def png(self) -> bytes:
        """The images beside each other, at their own size. Raises `ModelError` without pillow."""
        pil = pillow()
        gap = self.images.new_full((*self.images.shape[1:3], _GAP), 1.0)
        parts = [part for image in self.images for part in (image, gap)]
        data = io.BytesIO()
        pil.Image.fromarray(_pixels(torch.cat(parts[:-1], -1), 1)).save(data, "PNG")
        return data.getvalue()


@dataclass(frozen=True)
class Sheet:
    """Strips below each other, with the columns' names."""

    title: str
    caption: str
    columns: Sequence[str]
    strips: Sequence[Strip]


def write_grid(
    cells: Sequence[Sequence[Float[Tensor, "channels height width"]]],
    path: Path,
    *,
    row_names: Sequence[str],
    column_names: Sequence[str] = (),
    zoom: int = 2,
) -> None:
    """Rows of grey or RGB images in [-1, 1], each enlarged `zoom` times, as one PNG.

    Raises `ModelError` without pillow, `OutputError` where `path` cannot be written.
    """
    pil = pillow()
    height, width = (side * zoom + _GAP for side in cells[0][0].shape[-2:])
    top = _LABEL_HEIGHT if column_names else 0
    measure = pil.ImageDraw.Draw(pil.Image.new("RGB", (1, 1)))
    left = max(_LABEL_WIDTH, *(int(measure.textlength(name)) + 6 for name in row_names))
    size = (left + width * max(map(len, cells)), top + height * len(cells))
    sheet = pil.Image.new("RGB", size, "white")
    draw = pil.ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        draw.text((left + column * width + 2, 1), name, fill="black")
    for row, (name, images) in enumerate(zip(row_names, cells, strict=True)):
        draw.text((2, top + row * height + height // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            place = (left + column * width, top + row * height)
            sheet.paste(pil.Image.fromarray(_pixels(image, zoom)), place)
    with replacing(path) as aside:
        sheet.save(aside, format="PNG")


def pillow() -> Any:
    """The package PIL with what is used of it. Raises `ModelError` where it is not installed."""
    try:
        import PIL.Image
        import PIL.ImageDraw
    except ImportError as error:
        raise ModelError(
            "PNG files are written with pillow, which is not installed",
            "install it: pip install 'loralab[images]'.",
        ) from error
    return PIL


def _pixels(image: Float[Tensor, "channels height width"], zoom: int):
    """Bytes (height, width, 3), each pixel a square of `zoom`."""
    grown = image.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    grown = grown.expand(3, *grown.shape[1:]) if grown.shape[0] == 1 else grown
    scaled = ((grown.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).contiguous().numpy()
