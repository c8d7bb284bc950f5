"""Three style adapters of one small image model, from nothing: trained, looked at, judged.

`python benchmarks/styles.py --json` prints the judges' figures, seconds, and where the grid lies.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loralab import adapters
from loralab.imaging import (
    LOOKS,
    PLAIN,
    STYLE_TARGETS,
    STYLES,
    Denoiser,
    Denoising,
    Digits,
    ImageRow,
    Judges,
    base_is_no_style,
    build_denoiser,
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

BASE_RATE, STYLE_RATE = 2e-3, 3e-3
BASE_BATCH, STYLE_BATCH = 64, 16  # of a style's step: rows of each style
RANK, ALPHA = 8, 16
MIX_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Run everything and print one JSON document, or lines."""
    arguments = _arguments()
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
    denoiser = _timed(seconds, "base", lambda: _base(digits, arguments))
    save_denoiser(denoiser, folder / "base")
    _timed(seconds, "styles", lambda: train_styles(denoiser, digits, arguments.style_steps))
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


def train_base(digits: Digits, num_steps: int) -> Denoiser:
    """A denoiser of the plain training digits."""
    denoiser = build_denoiser()
    objective = Denoising(denoiser, bfloat16=True)
    batches = _batches(digits.train, BASE_BATCH, num_steps, seed=0)
    _train(objective, denoiser.unet.parameters(), batches, BASE_RATE)
    return denoiser


def train_styles(denoiser: Denoiser, digits: Digits, num_steps: int) -> None:
    """An adapter for each style, all in one pass: each row goes its own style's way."""
    config = adapters.LoRAConfig(rank=RANK, alpha=ALPHA, targets=STYLE_TARGETS)
    for number, style in enumerate(STYLES):
        adapters.attach(denoiser.unet, config, name=style, seed=number)
    rows = {style: styled(digits.train, style) for style in STYLES}
    batches = [
        [row for style_rows in parts for row in style_rows]
        for parts in zip(
            *(_batches(rows[style], STYLE_BATCH, num_steps, seed=1) for style in STYLES),
            strict=True,
        )
    ]
    trained = [
        parameter
        for style in STYLES
        for parameter in adapters.adapter_parameters(denoiser.unet, style).values()
    ]
    objective = Denoising(denoiser, bfloat16=True)
    with adapters.use(denoiser.unet, [style for style in STYLES for _ in range(STYLE_BATCH)]):
        _train(objective, trained, batches, STYLE_RATE, groups=len(STYLES))


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


def _base(digits: Digits, arguments: argparse.Namespace) -> Denoiser:
    if arguments.base:
        return load_denoiser(Path(arguments.base))
    return train_base(digits, arguments.base_steps)


def _batches(
    rows: Sequence[ImageRow], size: int, num_steps: int, seed: int
) -> list[list[ImageRow]]:
    """So many batches, epoch after epoch, each epoch shuffled anew."""
    order = random.Random(seed)
    pool: list[ImageRow] = []
    while len(pool) < size * num_steps:
        pool += order.sample(list(rows), len(rows))
    return [pool[step * size : (step + 1) * size] for step in range(num_steps)]


def _train(
    objective: Denoising,
    parameters: Any,
    batches: Sequence[Sequence[ImageRow]],
    rate: float,
    groups: int = 1,
) -> None:
    """AdamW, a short warmup, then linearly to nothing. `groups` sets of parameters share a batch,
    each with its part of the rows: the loss is the sum of the parts' means."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    torch.manual_seed(0)
    objective.model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 1 - step / len(batches))
        (objective.nll_sum(batch) * groups / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0 * groups**0.5)
        optimizer.step()
        optimizer.zero_grad()


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
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--style-steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=200, help="judged images of each style")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(tempfile.gettempdir()) / "loralab-styles"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
