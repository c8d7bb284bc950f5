"""Images of a run's validation prompts: on the way, and beside the base's at the end."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.config import ImagesSection
from loralab.events import Listener, Phase
from loralab.files import replacing
from loralab.imaging import Sheet, Strip, write_grid
from loralab.imaging.latent import Drawing, LatentBase, draw, from_bytes, to_bytes
from loralab.runs.images.subject import Judgement

SAMPLES, GRID = "samples", "grid.png"
SEED = 0  # of the first prompt; the next has the next one


def drawing_of(images: ImagesSection) -> Drawing:
    """How a run's images are drawn."""
    return Drawing(
        images.resolution, images.sampling_steps, images.guidance, images.negative_prompt
    )


@dataclass(frozen=True)
class Samples:
    """Draws the validation prompts of a run; those of the way lie in its `samples/`."""

    base: LatentBase
    unet: nn.Module
    route: str
    images: ImagesSection
    folder: Path

    def keep(self, step: int) -> None:
        """Draw each prompt as the adapter is now, a PNG file each."""
        for number, [image] in enumerate(self._draw([self.route])):
            with replacing(self._place(step) / f"{number:02d}.png") as aside:
                aside.write_bytes(to_bytes(image))

    def judge(self, listen: Listener) -> Judgement:
        """The base's images, those that were kept, and the adapter's: a strip a prompt."""
        document: dict[str, Any] = {"task": "image", "split": "images", "rows": 0, "metrics": {}}
        if not self._prompts:
            return Judgement(document)
        listen(Phase("drawing the validation prompts", 2 * len(self._prompts), "images"))
        ends = self._draw([None, self.route])
        kept = {step: self._kept(step) for step in self._steps()}
        columns = ["base", *(f"step {step}" for step in kept), "trained"]
        strips = [
            Strip(prompt, torch.stack([plain, *(each[number] for each in kept.values()), styled]))
            for number, (prompt, (plain, styled)) in enumerate(
                zip(self._prompts, ends, strict=True)
            )
        ]
        caption = (
            "A strip has one seed throughout, so that it shows what the adapter alone changes."
        )
        sheet = Sheet("Validation prompts", caption, columns, strips)
        write_grid(
            [list(strip.images) for strip in strips],
            self.folder / GRID,
            row_names=[strip.label for strip in strips],
            column_names=columns,
            zoom=1,
        )
        return Judgement({**document, "grid": GRID}, self._rows(ends), [sheet])

    def _draw(self, routes: list[str | None]) -> list[list[Tensor]]:
        return draw(
            self.base,
            self.unet,
            self._prompts,
            drawing_of(self.images),
            routes=routes,
            seed=SEED,
        )

    def _rows(self, ends: list[list[Tensor]]) -> list[dict[str, Any]]:
        """What each image is, and how far the adapter moved it: mean squared, in [-1, 1]."""
        return [
            {
                "id": f"prompt/{number:02d}",
                "prompt": prompt,
                "seed": SEED + number,
                "moved": (styled - plain).square().mean().item(),
            }
            for number, (prompt, (plain, styled)) in enumerate(
                zip(self._prompts, ends, strict=True)
            )
        ]

    def _steps(self) -> list[int]:
        """The steps of which all images are there."""
        found = sorted((self.folder / SAMPLES).glob("step-*"))
        whole = [f for f in found if len(list(f.glob("*.png"))) == len(self._prompts)]
        return [int(folder.name.removeprefix("step-")) for folder in whole]

    def _kept(self, step: int) -> list[Tensor]:
        files = sorted(self._place(step).glob("*.png"))
        return [from_bytes(file.read_bytes()) for file in files]

    @property
    def _prompts(self) -> list[str]:
        return self.images.validation_prompts

    def _place(self, step: int) -> Path:
        return self.folder / SAMPLES / f"step-{step:08d}"
