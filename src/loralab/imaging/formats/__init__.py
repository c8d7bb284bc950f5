"""LoRA files of the image world: diffusers' own, kohya-ss keys, the names of original releases."""

from loralab.imaging.formats.reading import read_image_adapter
from loralab.imaging.formats.writing import write_image_adapter

__all__ = ["read_image_adapter", "write_image_adapter"]
