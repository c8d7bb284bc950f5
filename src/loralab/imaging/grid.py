"""Images side by side in one PNG, with names at the rows and columns."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import ModelError
from loralab.files import replacing

_GAP, _LABEL_HEIGHT, _LABEL_WIDTH = 2, 14, 72


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
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ModelError(
            "PNG files are written with pillow, which is not installed",
            "install it: pip install 'loralab[images]'.",
        ) from error
    height, width = (side * zoom + _GAP for side in cells[0][0].shape[-2:])
    top = _LABEL_HEIGHT if column_names else 0
    size = (_LABEL_WIDTH + width * max(map(len, cells)), top + height * len(cells))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        draw.text((_LABEL_WIDTH + column * width + 2, 1), name, fill="black")
    for row, (name, images) in enumerate(zip(row_names, cells, strict=True)):
        draw.text((2, top + row * height + height // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            place = (_LABEL_WIDTH + column * width, top + row * height)
            sheet.paste(Image.fromarray(_pixels(image, zoom)), place)
    with replacing(path) as aside:
        sheet.save(aside, format="PNG")


def _pixels(image: Float[Tensor, "channels height width"], zoom: int):
    """Bytes (height, width, 3), each pixel a square of `zoom`."""
    grown = image.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    grown = grown.expand(3, *grown.shape[1:]) if grown.shape[0] == 1 else grown
    scaled = ((grown.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(1, 2, 0).contiguous().numpy()
