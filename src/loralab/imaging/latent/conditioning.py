"""What a frozen text encoder says of captions, computed once for each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.imaging.latent.base import LatentBase


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A caption as the UNet reads it.

    hidden: a vector for each token. pooled: one for the whole caption (SDXL; None elsewhere).
    was_cut: whether the caption has more tokens than the text encoder reads.
    """

    hidden: Float[Tensor, "tokens width"]
    pooled: Float[Tensor, "pooled"] | None
    was_cut: bool


def encode_captions(base: LatentBase, captions: Iterable[str]) -> dict[str, Conditioning]:
    """Each caption encoded by the pipeline's own `encode_prompt`, on the CPU; the text encoders are
    released afterwards. One by one, so that a caption does not depend on its neighbours."""
    found: dict[str, Conditioning] = {}
    with base.text_stage() as pipeline:
        for caption in captions:
            if caption not in found:
                found[caption] = _encode(base, pipeline, caption)
    return found


@torch.no_grad()
def _encode(base: LatentBase, pipeline: Any, caption: str) -> Conditioning:
    said = pipeline.encode_prompt(
        prompt=caption,
        device=base.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    hidden, pooled = said[0], said[2] if base.family.is_xl else None
    return Conditioning(
        hidden[0].cpu(),
        None if pooled is None else pooled[0].cpu(),
        is_cut(pipeline, caption),
    )


def is_cut(pipeline: Any, caption: str) -> bool:
    """Whether the pipeline's text encoder reads only a part of the caption."""
    ids = pipeline.tokenizer(caption, truncation=False, verbose=False).input_ids
    return len(ids) > pipeline.tokenizer.model_max_length
