"""`loralab generate RUN "3:bold 3" --image FILE`: images of a denoiser, each along its route."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.adapters import load_adapter
from loralab.config import ImagesSection
from loralab.errors import DataError, ModelError, RunError, nearest
from loralab.events import Listener, Note, Phase, ignore
from loralab.imaging import Denoiser, load_denoiser, sample_images, write_grid
from loralab.runs.folder import MANIFEST, Run, open_run
from loralab.runs.images.digits import is_digits
from loralab.runs.images.drawing import draw_prompt
from loralab.runs.images.evaluating import BASE, base_of

SYNTAX = "write CLASS, CLASS:ADAPTER or CLASS:ADAPTER=WEIGHT,ADAPTER=WEIGHT, with spaces between."
_COLUMNS = 10


@dataclass(frozen=True)
class Wanted:
    """One image: its class, and the weight of each adapter."""

    label: int
    route: dict[str, float]


def generate_images(
    folder: str | Path,
    prompt: str,
    image: str | Path,
    *,
    seed: int = 0,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Images by a denoiser and its adapters, all in one batch, as one PNG.

    folder: a finished run, a diffusers folder, or a folder that holds one (`base/`) and a folder
        for each adapter.
    prompt: words `CLASS[:ADAPTER[=WEIGHT][,...]]`, an image each; without an adapter the base's.
        With a run of a Stable Diffusion base: what the image shows.
    seed: of the first image; the next has the next one. Seed, class and route decide an image.

    Raises `ModelError` for a folder without a denoiser, `DataError` that lists every word that
    cannot be followed, `OutputError` where the PNG cannot be written.
    """
    folder, image = Path(folder), Path(image)
    run = _run(folder)
    if run is not None and not is_digits(run.config):
        return draw_prompt(run, prompt, image, seed=seed, listen=listen)
    base, settings = _base(folder, run, listen)
    known = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    listen(Phase("loading the model", None, "files"))
    denoiser = load_denoiser(base)
    wanted = parse_prompt(prompt, known, num_classes=denoiser.none_class)
    for name in sorted({name for each in wanted for name in each.route}):
        load_adapter(denoiser.unet, folder / name, name)
    return _generate(denoiser, wanted, image, seed, settings, listen)


def _run(folder: Path) -> Run | None:
    """The finished run of an image model that the folder is; None for other folders."""
    if not (folder / MANIFEST).is_file():
        return None
    run = open_run(folder)
    if run.config.model.task != "image":
        raise RunError(
            f"{folder} is a run of a language model", "leave --image out to give it a prompt."
        )
    run.check_finished()
    return run


def _base(folder: Path, run: Run | None, listen: Listener) -> tuple[Path, ImagesSection]:
    """Where the folder's denoiser lies, and how it is to be sampled."""
    if run is not None:
        return base_of(run, listen), run.config.images
    for base in (folder / BASE, folder):
        if (base / "unet").is_dir():
            return base, ImagesSection()
    raise ModelError(
        f"{folder} has no {BASE}/, so there is no image model",
        "name a run of an image model (`loralab train digits-styles`), a merged one, or a folder"
        f" with a diffusers folder {BASE}/ and one folder for each adapter.",
    )


def parse_prompt(prompt: str, known: Sequence[str], *, num_classes: int) -> list[Wanted]:
    """The images that a prompt asks for. Raises `DataError` with all its faults."""
    faults: list[str] = []
    wanted: list[Wanted] = []
    for word in prompt.split():
        text, _, route = word.partition(":")
        if not (text.isascii() and text.isdigit() and int(text) < num_classes):
            faults.append(f"{word!r}: {text!r} is no class from 0 to {num_classes - 1}")
            continue
        weights: dict[str, float] = {}
        for part in filter(None, route.split(",")):
            name, equals, weight = part.partition("=")
            if name not in known:
                faults.append(f"{word!r}: no adapter {name!r}; {nearest(name, known)}")
            elif name in weights:
                faults.append(f"{word!r}: {name!r} stands twice")
            else:
                weights[name] = _number(weight) if equals else 1.0
                if not math.isfinite(weights[name]):
                    faults.append(f"{word!r}: {weight!r} is no weight")
        wanted.append(Wanted(int(text), weights))
    if faults or not wanted:
        raise DataError("; ".join(faults) or "the prompt is empty", SYNTAX)
    return wanted


def _generate(
    denoiser: Denoiser,
    wanted: Sequence[Wanted],
    image: Path,
    seed: int,
    settings: ImagesSection,
    listen: Listener,
) -> dict[str, Any]:
    listen(Phase(f"drawing {len(wanted)} images", None, "steps"))
    began = time.perf_counter()
    seeds = list(range(seed, seed + len(wanted)))
    labels = [each.label for each in wanted]
    routes = [each.route or None for each in wanted]
    images = sample_images(
        denoiser,
        labels,
        seeds=seeds,
        routes=routes,
        num_steps=settings.sampling_steps,
        guidance=settings.guidance,
    ).cpu()
    seconds = time.perf_counter() - began
    rows = [list(images[i : i + _COLUMNS]) for i in range(0, len(images), _COLUMNS)]
    firsts = [f"{start * _COLUMNS + 1} ..." for start in range(len(rows))]
    write_grid(rows, image, row_names=firsts)
    listen(Note(f"{len(wanted)} images in {seconds:.1f} s"))
    return {
        "image": str(image),
        "images": [
            {"label": each.label, "route": each.route, "seed": own}
            for each, own in zip(wanted, seeds, strict=True)
        ],
        "seconds": round(seconds, 3),
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
