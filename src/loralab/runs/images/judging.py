"""What style adapters do, measured: judges on generated images, mixes, merging, and the sheets."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from loralab.adapters import merge
from loralab.config import ImagesSection
from loralab.events import Listener, Phase, Progress
from loralab.imaging import (
    PLAIN,
    Denoiser,
    Digits,
    Judges,
    Sheet,
    Strip,
    digits_seen,
    frechet_distance,
    looks_seen,
    sample_images,
    stack,
    style_shares,
    styled,
    train_judges,
    write_grid,
)
from loralab.measuring import Interval, wilson
from loralab.runs.images.subject import Judgement

GRID = "grid.png"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_DIGITS = 10
MIX_IMAGES = 20  # of each weight
SAME_IMAGE = 1 / 255  # in [-1, 1]: half of one of 256 greys


@dataclass(frozen=True)
class Mix:
    """Images at each weight on the way from one look to another, from the same seeds."""

    start: str
    end: str
    images: dict[float, Tensor]


def judge_styles(
    denoiser: Denoiser, digits: Digits, images: ImagesSection, folder: Path, listen: Listener
) -> Judgement:
    """Figures, a row an image, and sheets of a denoiser that hosts `images.styles`.

    Looks of the same digit come from the same seeds. Without judged images there are sheets alone.
    """
    draw = _Drawing(denoiser, images, listen)
    mixes = draw.mixes()
    sheets = _sheets(mixes)
    _write_sheets(sheets, folder / GRID)
    document: dict[str, Any] = {"task": "image", "split": "images", "grid": GRID}
    if not images.judged_images:
        return Judgement({**document, "rows": 0, "metrics": {}}, sheets=sheets)
    looks = draw.looks()
    merged = draw.merged(looks)
    listen(Phase("judging"))
    judges = train_judges(digits.held_out)
    rows = [row for look, made in looks.items() for row in _rows(judges, look, made)]
    document |= {
        "rows": len(rows),
        "metrics": _metrics(rows),
        "looks": {look: _look(judges, rows, look, made, digits) for look, made in looks.items()},
        "mixes": [_mix(judges, mix) for mix in mixes],
        "merged": merged,
        "judges": {"digit": judges.digit_check, "look": judges.style_check},
    }
    return Judgement(document, rows, sheets)


class _Drawing:
    """All images that are looked at, drawn with the run's settings."""

    def __init__(self, denoiser: Denoiser, images: ImagesSection, listen: Listener) -> None:
        self._denoiser, self._images = denoiser, images
        self._listen, self._done = listen, 0
        self._drawn: dict[tuple[Any, ...], Tensor] = {}
        own = [(PLAIN, style) for style in images.styles]
        self._pairs = [*own, *itertools.pairwise(images.styles)]
        self._of_a_mix = MIX_IMAGES if images.judged_images else NUM_DIGITS
        judged = images.judged_images * (len(images.styles) + 1)
        inner = len(WEIGHTS) - 2
        mixes = 1 + len(own) * (1 + inner) + (len(self._pairs) - len(own)) * inner
        total = mixes * self._of_a_mix + judged
        listen(Phase("drawing what the adapters learned", total, "images"))

    def looks(self) -> dict[str, Tensor]:
        """Images of the base and of each style."""
        count = self._images.judged_images
        names = (PLAIN, *self._images.styles)
        return {look: self._draw(count, _mixed(PLAIN, look, 1.0)) for look in names}

    def mixes(self) -> list[Mix]:
        """From the base to each style, and from each style to the next."""
        count = self._of_a_mix
        return [
            Mix(start, end, {w: self._draw(count, _mixed(start, end, w)) for w in WEIGHTS})
            for start, end in self._pairs
        ]

    def merged(self, looks: Mapping[str, Tensor]) -> dict[str, float]:
        """How far images of the merged model are from those with the adapter apart, at most."""
        count = min(NUM_DIGITS, self._images.judged_images)
        found = {}
        for style in self._images.styles:
            plain, _ = merge(self._denoiser.unet, style)
            alone = Denoiser(cast(Any, plain), self._denoiser.scheduler)
            made = _sample(alone, count, self._images)
            found[style] = (made - looks[style][:count]).abs().max().item()
        return found

    def _draw(self, count: int, route: dict[str, float]) -> Tensor:
        key = (count, *sorted(route.items()))
        if key not in self._drawn:
            self._drawn[key] = _sample(self._denoiser, count, self._images, route)
            self._done += count
            self._listen(Progress(self._done))
        return self._drawn[key]


def _sample(
    denoiser: Denoiser, count: int, images: ImagesSection, route: dict[str, float] | None = None
) -> Tensor:
    """The digits in turn, each from the seed of its number."""
    return sample_images(
        denoiser,
        [index % NUM_DIGITS for index in range(count)],
        seeds=range(count),
        routes=None if route is None else [route or None] * count,
        num_steps=images.sampling_steps,
        guidance=images.guidance,
    ).cpu()


def _mixed(start: str, end: str, weight: float) -> dict[str, float]:
    """The route that is `weight` of the way from one look to another."""
    shares = {start: 1 - weight, end: weight}
    return {look: share for look, share in shares.items() if look != PLAIN and share}


def _rows(judges: Judges, look: str, images: Tensor) -> list[dict[str, Any]]:
    seen = zip(looks_seen(judges, images), digits_seen(judges, images), strict=True)
    return [
        {
            "id": f"{look}/{number:04d}",
            "look": look,
            "digit": number % NUM_DIGITS,
            "seed": number,
            "seen_look": seen_look,
            "seen_digit": seen_digit,
        }
        for number, (seen_look, seen_digit) in enumerate(seen)
    ]


def _metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """The run's headline: of all styles together, and of the base."""
    styles = [row for row in rows if row["look"] != PLAIN]
    base = [row for row in rows if row["look"] == PLAIN]
    return {
        "style_accuracy": _share(styles, "look"),
        "digit_accuracy": _share(styles, "digit"),
        "base_is_no_style": _share(base, "look"),
    }


def _share(rows: Sequence[dict[str, Any]], what: str) -> Interval:
    """The share of rows whose look or digit is seen as it was asked for (Wilson's interval)."""
    right = sum(row[what] == row[f"seen_{what}"] for row in rows)
    low, high = wilson(right, len(rows))
    return {"mean": right / len(rows), "low": low, "high": high}


def _look(
    judges: Judges, rows: Sequence[dict[str, Any]], look: str, images: Tensor, digits: Digits
) -> dict[str, Any]:
    own = [row for row in rows if row["look"] == look]
    real = stack(styled(digits.held_out[: len(images)], look))
    distance = frechet_distance(judges, images, real)
    return {
        "style_accuracy": _share(own, "look"),
        "digit_accuracy": _share(own, "digit"),
        "frechet_distance": {"mean": distance.value, "low": distance.low, "high": distance.high},
    }


def _mix(judges: Judges, mix: Mix) -> dict[str, Any]:
    """The style judge's mean probability of both ends at each weight.

    monotone: that of the start never rises and that of the end never falls, to a hundredth.
    """
    shares = [style_shares(judges, made) for made in mix.images.values()]
    start, end = ([share[look] for share in shares] for look in (mix.start, mix.end))
    return {
        "start": mix.start,
        "end": mix.end,
        "weights": list(mix.images),
        "start_share": start,
        "end_share": end,
        "images_of_each": MIX_IMAGES,
        "monotone": _rises(end) and _rises([-share for share in start]),
    }


def _rises(values: Sequence[float]) -> bool:
    return all(b >= a - 0.01 for a, b in itertools.pairwise(values))


def _sheets(mixes: Sequence[Mix]) -> list[Sheet]:
    """Styles at each weight, and mixes of two styles; ten digits each."""
    columns = [str(digit) for digit in range(NUM_DIGITS)]
    own = [mix for mix in mixes if mix.start == PLAIN]
    base = Strip("base", own[0].images[0.0][:NUM_DIGITS], "no adapter")
    strips = [
        Strip(mix.end, made[:NUM_DIGITS], f"weight {weight:g}")
        for mix in own
        for weight, made in mix.images.items()
        if weight
    ]
    caption = "A column has one seed throughout, so that it shows what the adapter alone changes."
    sheets = [Sheet("Styles, digits, weights", caption, columns, [base, *strips])]
    for mix in mixes:
        if mix.start != PLAIN:
            strips = [
                Strip(f"{mix.start} {1 - weight:g}", made[:NUM_DIGITS], f"{mix.end} {weight:g}")
                for weight, made in mix.images.items()
            ]
            title = f"From {mix.start} to {mix.end}"
            sheets.append(Sheet(title, "Both adapters at once.", columns, strips))
    return sheets


def _write_sheets(sheets: Sequence[Sheet], path: Path) -> None:
    strips = [strip for sheet in sheets for strip in sheet.strips]
    write_grid(
        [list(strip.images) for strip in strips],
        path,
        row_names=[" ".join(filter(None, (strip.label, strip.detail))) for strip in strips],
        column_names=sheets[0].columns,
    )
