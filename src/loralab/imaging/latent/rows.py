"""Rows of latent training: an image as a latent, its caption as the UNet reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, tensor

from loralab.errors import DataError
from loralab.imaging.latent.conditioning import Conditioning
from loralab.imaging.latent.latents import EncodedPictures, Latent


@dataclass(frozen=True, eq=False)
class LatentRow:
    """One image, a `data.Row`; prior: the class image that shares its steps (`with_prior`)."""

    id: str
    caption: str
    latent: Latent
    conditioning: Conditioning
    resolution: int
    prior: "LatentRow | None" = None
    label: int | None = None
    num_tokens: int = 1
    num_targets: int = 1

    @property
    def group(self) -> str:
        """Each image is its own."""
        return self.id

    @property
    def time_ids(self) -> Float[Tensor, "6"]:
        """What SDXL is told of sizes: the original's, the crop's corner, the target's."""
        sizes = (*self.latent.original, *self.latent.corner, self.resolution, self.resolution)
        return tensor([float(size) for size in sizes])

    def content(self) -> list[Any]:
        """What identifies the row: captions and the keys of latents."""
        own: list[Any] = [self.caption, self.latent.key]
        return own if self.prior is None else [*own, self.prior.content()]


def latent_rows(
    encoded: EncodedPictures, conditioning: Mapping[str, Conditioning], resolution: int
) -> tuple[LatentRow, ...]:
    """A row for each picture; `conditioning` has every caption."""
    return tuple(
        LatentRow(p.name, p.caption, latent, conditioning[p.caption], resolution)
        for p, latent in zip(encoded.pictures, encoded.latents, strict=True)
    )


def with_prior(
    instances: Sequence[LatentRow], priors: Sequence[LatentRow]
) -> tuple[LatentRow, ...]:
    """Each step's rows of both kinds: as many pairs as the longer of the two has rows, the shorter
    begun again where it ends (DreamBooth, Ruiz et al. 2022, 2208.12242).

    Raises `DataError` where one of them is empty.
    """
    if not instances or not priors:
        raise DataError(
            f"prior preservation needs images of both kinds: {len(instances)} of the instance, "
            f"{len(priors)} of its class",
            "give both, or set images.prior_weight to 0.",
        )
    return tuple(
        replace(
            instances[number % len(instances)],
            id=f"{instances[number % len(instances)].id}+{priors[number % len(priors)].id}",
            prior=priors[number % len(priors)],
        )
        for number in range(max(len(instances), len(priors)))
    )
