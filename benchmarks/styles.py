"""Three style adapters of one small image model, from nothing: trained, looked at, judged.

`python benchmarks/styles.py --json` prints the judges' figures, seconds, and where the grid lies.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loralab import adapters
from loralab.config import MethodSection, TrainingSection
from loralab.imaging import (
    LOOKS,
    PLAIN,
    STYLE_TARGETS,
    STYLES,
    Denoiser,
    Digits,
    ImageRow,
    Judges,
    base_is_no_style,
    build_denoiser,
    denoising,
    digit_accuracy,
    frechet_distance,
    load_denoiser,
    load_digits,
    sample_images,
    save_denoiser,
    stack,
    style_accuracy,
    style_shares,
    styled,
    train_judges,
    write_grid,
)
from loralab.training import StepDone, Trainable, fit, prepare

BASE_RATE, STYLE_RATE = 2e-3, 3e-3
BASE_BATCH, STYLE_BATCH = 64, 24
RANK, ALPHA = 8, 16
MIX_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Run everything and print one JSON document, or lines."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The base and the styles trained, sampled and judged."""
    seconds: dict[str, float] = {}
    folder = Path(arguments.output)
    digits = load_digits()
    with tempfile.TemporaryDirectory() as runs:
        base, styles = Path(runs, "base"), Path(runs, "styles")
        denoiser = _timed(seconds, "base", lambda: _base(digits, base, arguments))
        save_denoiser(denoiser, folder / "base")
        _timed(seconds, "styles", lambda: train_styles(denoiser, digits, styles, arguments))
    for style in STYLES:
        adapters.save_adapter(denoiser.unet, style, folder / style)
    judges = train_judges(digits.held_out)
    looks = [None, *STYLES]
    thirty = [index % 10 for index in range(30)]
    thirty_routes = [[*STYLES][index // 10] for index in range(30)]
    _timed(
        seconds,
        "30_images",
        lambda: sample_images(denoiser, thirty, seeds=range(30), routes=thirty_routes),
    )
    labels = [index % 10 for index in range(arguments.images)]
    generated = {
        look or PLAIN: sample_images(
            denoiser, labels, seeds=range(len(labels)), routes=[look] * len(labels)
        )
        for look in looks
    }
    grid = folder / "grid.png"
    mixes = mixed(denoiser, "bold", "outline")
    _write_grid(generated, mixes, grid)
    return {
        **_judged(judges, generated, labels, digits),
        "mix_bold_to_outline": _mix_shares(judges, mixes),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "judges": {"digit_check": judges.digit_check, "style_check": judges.style_check},
        "parameters": dict(
            zip(("trained", "all"), adapters.count_parameters(denoiser.unet), strict=True)
        ),
        "images_of_each": len(labels),
        "threads": arguments.threads,
        "grid": str(grid),
    }


def train_base(digits: Digits, folder: Path, arguments: argparse.Namespace) -> Denoiser:
    """A denoiser of the plain training digits; `folder` is its run."""
    denoiser = build_denoiser()
    training = _training(BASE_RATE, BASE_BATCH, arguments.base_steps, digits, arguments)
    method = MethodSection(kind="full")
    task = denoising(denoiser.scheduler, bfloat16=True)
    _run(prepare(denoiser.unet, method, training, task=task), digits.train, folder)
    return denoiser


def train_styles(
    denoiser: Denoiser, digits: Digits, folder: Path, arguments: argparse.Namespace
) -> None:
    """An adapter for each style over the same frozen base; each has its run under `folder`."""
    training = _training(STYLE_RATE, STYLE_BATCH, arguments.style_steps, digits, arguments)
    method = MethodSection(kind="lora", rank=RANK, alpha=ALPHA, targets=list(STYLE_TARGETS))
    task = denoising(denoiser.scheduler, bfloat16=True)
    for style in STYLES:
        trainable = prepare(denoiser.unet, method, training, task=task, name=style)
        _run(trainable, styled(digits.train, style), folder / style)


def mixed(denoiser: Denoiser, start: str, end: str) -> dict[float, torch.Tensor]:
    """Ten digits at each weight between two styles, from the same seeds."""
    return {
        weight: sample_images(
            denoiser,
            list(range(10)),
            seeds=range(10),
            routes=[{start: 1 - weight, end: weight}] * 10,
        )
        for weight in MIX_WEIGHTS
    }


def _base(digits: Digits, folder: Path, arguments: argparse.Namespace) -> Denoiser:
    if arguments.base:
        return load_denoiser(Path(arguments.base))
    return train_base(digits, folder, arguments)


def _training(
    rate: float, batch_size: int, num_steps: int, digits: Digits, arguments: argparse.Namespace
) -> TrainingSection:
    return TrainingSection(
        learning_rate=rate,
        batch_size=batch_size,
        epochs=-(-num_steps * batch_size // len(digits.train)) + 1,
        max_steps=num_steps,
        weight_decay=0.0,
        checkpoint_steps=1000,
        device="cpu",
        threads=arguments.threads,
    )


def _run(trainable: Trainable, rows: Sequence[ImageRow], folder: Path) -> None:
    """The product's own loop, without validation: no choice is made by held-out rows."""
    for event in fit(trainable, rows, (), folder):
        if isinstance(event, StepDone) and event.step % 100 == 0:
            logging.info("%s step %d loss %.4f", folder.name, event.step, event.loss)


def _judged(
    judges: Judges, generated: dict[str, torch.Tensor], labels: list[int], digits: Digits
) -> dict[str, Any]:
    real = digits.held_out[: len(labels)]
    distances = {
        look: frechet_distance(judges, images, stack(styled(real, look)))
        for look, images in generated.items()
    }
    return {
        "style_accuracy": {
            style: round(style_accuracy(judges, generated[style], style), 3) for style in STYLES
        },
        "digit_accuracy": {
            look: round(digit_accuracy(judges, images, labels), 3)
            for look, images in generated.items()
        },
        "base_is_no_style": round(base_is_no_style(judges, generated[PLAIN]), 3),
        "frechet_distance": {
            look: {"value": d.value, "low": d.low, "high": d.high} for look, d in distances.items()
        },
    }


def _mix_shares(judges: Judges, mixes: dict[float, torch.Tensor]) -> dict[str, dict[str, float]]:
    return {str(weight): style_shares(judges, images) for weight, images in mixes.items()}


def _write_grid(
    generated: dict[str, torch.Tensor], mixes: dict[float, torch.Tensor], path: Path
) -> None:
    cells = [list(generated[look][:10]) for look in LOOKS]
    cells += [list(images) for images in mixes.values()]
    names = [*LOOKS, *(f"outline {weight:.2f}" for weight in mixes)]
    write_grid(cells, path, row_names=names, column_names=[str(digit) for digit in range(10)])


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - began
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--base", help="a trained base's folder, instead of training one")
    parser.add_argument("--base-steps", type=int, default=1150)
    parser.add_argument("--style-steps", type=int, default=280)
    parser.add_argument("--images", type=int, default=80, help="judged images of each style")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(tempfile.gettempdir()) / "loralab-styles"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
