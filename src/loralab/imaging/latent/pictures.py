"""A folder of images with captions: which files, what each shows, and its pixels.

Captions come from `metadata.jsonl` (Hugging Face's imagefolder: `file_name` and `text` a line),
from `name.txt` beside `name.png`, or from one prompt for all images that have none of their own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import DataError
from loralab.imaging.grid import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SHOWN = 20


@dataclass(frozen=True)
class Picture:
    """An image file and what it shows; digest: SHA-256 of the file's bytes."""

    name: str  # its path in the folder, with slashes
    path: Path
    caption: str
    digest: str

    @property
    def id(self) -> str:
        """Its name: what it is chosen by."""
        return self.name


@dataclass(frozen=True, eq=False)
class Framed:
    """An image resized and cropped to a square.

    pixels: RGB in [-1, 1]. original: (height, width) of the upright image. corner: (top, left) of
    the square in the resized one.
    """

    pixels: Float[Tensor, "3 side side"]
    original: tuple[int, int]
    corner: tuple[int, int]


def read_pictures(folder: str | Path, *, prompt: str | None = None) -> tuple[Picture, ...]:
    """The images of a folder and of those in it, sorted by name, each with its caption.

    prompt: the caption of images that have none of their own.

    Nothing outside the folder is read, by whatever name or link. Raises `DataError` with all faults
    at once: no image, images without a caption, lines of `metadata.jsonl` that name no image here.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no image folder {folder}", "give a folder of images.")
    faults: list[str] = []
    images = _images(folder, faults)
    if not images and not faults:
        raise DataError(
            f"{folder} holds no image ({', '.join(SUFFIXES)})", "give a folder of images."
        )
    captions = _captions(folder, images, faults)
    without = [name for name in images if name not in captions]
    if without and prompt is None and not faults:
        raise _without_caption(folder, without, len(images))
    if faults:
        raise DataError(
            f"{folder}: {_listed(faults)}",
            "mend the folder; nothing was read into the training.",
        )
    return tuple(
        Picture(name, path, captions.get(name, prompt or ""), _digest(path))
        for name, path in images.items()
    )


def frame(path: Path, resolution: int) -> Framed:
    """The upright RGB image, its shorter side resized to `resolution`, the middle square of it.

    Orientation is EXIF's, transparent places are white. Raises `DataError` where the file cannot be
    read as an image.
    """
    image = _upright(path)
    width, height = image.size
    scale = resolution / min(width, height)
    wide, high = (max(resolution, round(side * scale)) for side in (width, height))
    left, top = (wide - resolution) // 2, (high - resolution) // 2
    resized = image.resize((wide, high), pillow().Image.Resampling.LANCZOS)
    square = resized.crop((left, top, left + resolution, top + resolution))
    return Framed(to_pixels(square), (height, width), (top, left))


def to_pixels(image: "Image") -> Float[Tensor, "3 height width"]:
    """An RGB image in [-1, 1]."""
    values = torch.from_numpy(numpy.array(image, dtype=numpy.uint8)).permute(2, 0, 1)
    return values.float() / 127.5 - 1


def unreadable(faults: Sequence[str]) -> DataError:
    """The refusal of images that cannot be read, all of them named."""
    count = f"{len(faults)} images" if len(faults) > 1 else "an image"
    return DataError(
        f"{count} cannot be read: {_listed(faults)}",
        "mend or remove them, or set images.skip_unreadable to true to train without them.",
    )


def _images(folder: Path, faults: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in SUFFIXES or any(p.startswith(".") for p in name.split("/")):
            continue
        if path.is_dir():
            continue
        if not _is_inside(path, folder):
            faults.append(f"{name} is a link to a place outside the folder")
        elif not path.is_file():
            faults.append(f"{name} is a link to nothing")
        else:
            found[name] = path
    return found


def _captions(folder: Path, images: Mapping[str, Path], faults: list[str]) -> dict[str, str]:
    captions = _of_metadata(folder, images, faults)
    for name, path in images.items():
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            continue
        if name in captions:
            faults.append(f"{name} has a caption in {METADATA} and another in {beside.name}")
        elif not _is_inside(beside, folder):
            faults.append(f"{beside.name} is a link to a place outside the folder")
        elif text := _text(beside, faults):
            captions[name] = text
    return captions


def _of_metadata(folder: Path, images: Mapping[str, Path], faults: list[str]) -> dict[str, str]:
    file = folder / METADATA
    if not file.is_file():
        return {}
    if not _is_inside(file, folder):
        faults.append(f"{METADATA} is a link to a place outside the folder")
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(file, faults).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{METADATA} line {number}"
        row = _row(line)
        if row is None:
            faults.append(f"{place}: no table with file_name and text")
            continue
        name, caption = row
        if not _stays_inside(name):
            faults.append(f"{place}: {name!r} is outside the folder")
        elif name not in images:
            faults.append(f"{place}: there is no image {name!r}")
        elif name in captions:
            faults.append(f"{place}: {name!r} has a caption already")
        elif not caption.strip():
            faults.append(f"{place}: the text of {name!r} is empty")
        else:
            captions[name] = caption.strip()
    return captions


def _row(line: str) -> tuple[str, str] | None:
    try:
        table = json.loads(line)
    except ValueError:
        return None
    if not isinstance(table, dict):
        return None
    name, caption = table.get("file_name"), table.get("text")
    if not isinstance(name, str) or not isinstance(caption, str):
        return None
    return str(PurePosixPath(name)), caption


def _without_caption(folder: Path, names: Sequence[str], total: int) -> DataError:
    which = "no image" if len(names) == total else f"{len(names)} of {total} images"
    said = "has a caption" if len(names) == total else f"have no caption: {_listed(names)}"
    return DataError(
        f"{folder}: {which} {said}",
        f"write {METADATA} (a line for each image: file_name, text) or NAME.txt beside each image, "
        "or give one for all as images.prompt.",
    )


def _upright(path: Path) -> "Image":
    library = pillow().Image
    from PIL import ImageOps

    try:
        with library.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, library.DecompressionBombError) as error:
        raise DataError(f"{path.name}: {error}", "mend or remove it.") from error
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{path.name}: more than 8 bits a colour ({image.mode})", "save it with 8 bits."
        )
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = library.new("RGBA", image.size, "white")
        image = library.alpha_composite(white, image)
    return cast("Image", image.convert("RGB"))


def _text(file: Path, faults: list[str]) -> str:
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{file.name} is no UTF-8 text ({error})")
        return ""
    if not text:
        faults.append(f"{file.name} is empty")
    return text


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/"))
    return not parts.is_absolute() and ".." not in parts.parts and ":" not in parts.parts[0]


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _listed(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
