"""Judges of generated images: small classifiers that saw real, held-out images only."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from loralab.imaging.denoiser import Images
from loralab.imaging.digits import NUM_DIGITS, ImageRow, split, stack
from loralab.imaging.styles import PLAIN, STYLES, styled

LOOKS = (PLAIN, *STYLES)
"""The style judge's classes: the images as they are, and each style."""

_CHECK_SHARE = 0.3  # of the held-out images: judges are checked on these
_NUM_FEATURES = 32
_BATCH_SIZE, _LEARNING_RATE, _LARGEST_SHIFT = 64, 3e-3, 2


class Judge(nn.Module):
    """A small convolutional classifier of 1 x 32 x 32 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(1, 16, 5, stride=2), *_block(16, 32, 3, stride=2), *_block(32, 64, 3, stride=2)
        )
        self.features = nn.Linear(64 * 4 * 4, _NUM_FEATURES)
        self.score = nn.Linear(_NUM_FEATURES, num_classes)

    def embed(self, images: Images) -> Float[Tensor, "rows features"]:
        """What the last layer reads."""
        return functional.relu(self.features(self.body(images).flatten(1)))

    def forward(self, images: Images) -> Float[Tensor, "rows classes"]:
        """Logits of the classes."""
        return self.score(self.embed(images))


@dataclass(frozen=True)
class Judges:
    """Both judges with how they do on real images that they have not seen.

    digit_check, style_check: shares of right answers on those, every look equally often.
    """

    digit: Judge
    style: Judge
    digit_check: float
    style_check: float


@dataclass(frozen=True)
class FrechetDistance:
    """The distance of two samples' features with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def train_judges(held_out: Sequence[ImageRow], *, epochs: int = 10, seed: int = 0) -> Judges:
    """Train a digit judge and a style judge on 70 % of the held-out images in every look, and
    check them on the other 30 %."""
    learned, unseen = split(list(held_out), "judges' check", _CHECK_SHARE)
    images, digits, looks = _in_every_look(learned)
    digit = _train(images, digits, NUM_DIGITS, epochs, seed)
    style = _train(images, looks, len(LOOKS), epochs, seed + 1)
    images, digits, looks = _in_every_look(unseen)
    return Judges(digit, style, _accuracy(digit, images, digits), _accuracy(style, images, looks))


def style_accuracy(judges: Judges, images: Images, style: str) -> float:
    """The share of images that the style judge takes for that style."""
    return _accuracy(judges.style, images, torch.full((len(images),), LOOKS.index(style)))


def base_is_no_style(judges: Judges, images: Images) -> float:
    """The share of images that the style judge takes for none of the styles."""
    return style_accuracy(judges, images, PLAIN)


def digit_accuracy(judges: Judges, images: Images, labels: Sequence[int]) -> float:
    """The share of images in which the digit judge sees the digit that was asked for."""
    return _accuracy(judges.digit, images, torch.tensor(labels))


def looks_seen(judges: Judges, images: Images) -> list[str]:
    """What the style judge takes each image for: one of `LOOKS`."""
    return [LOOKS[index] for index in _logits(judges.style, images).argmax(-1).tolist()]


def digits_seen(judges: Judges, images: Images) -> list[int]:
    """The digit that the digit judge sees in each image."""
    return _logits(judges.digit, images).argmax(-1).tolist()


def style_shares(judges: Judges, images: Images) -> dict[str, float]:
    """The style judge's mean probability of each look."""
    means = _logits(judges.style, images).softmax(-1).mean(0).tolist()
    return dict(zip(LOOKS, means, strict=True))


def frechet_distance(
    judges: Judges, generated: Images, real: Images, *, resamples: int = 200, seed: int = 0
) -> FrechetDistance:
    """Fréchet's distance of normal fits to both judges' features (Heusel et al. 2017, 1706.08500).

    The distance of finite samples lies above the true one, and a resample's above that, since it
    has fewer distinct images. The interval is the resamples' spread about the value; compare
    distances of equally many images only.
    """
    ours, theirs = _features(judges, generated), _features(judges, real)
    value = _frechet(ours, theirs)
    draw = numpy.random.default_rng(seed)
    drawn = [_frechet(_resampled(ours, draw), _resampled(theirs, draw)) for _ in range(resamples)]
    low, high = value + numpy.quantile(drawn, (0.025, 0.975)) - numpy.mean(drawn)
    return FrechetDistance(value, max(0.0, float(low)), float(high))


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
    return [convolution, nn.GroupNorm(4, outputs), nn.ReLU()]


def _in_every_look(
    rows: Sequence[ImageRow],
) -> tuple[Images, Int[Tensor, "rows"], Int[Tensor, "rows"]]:
    """(images, digits, looks): each row once in every look."""
    images = torch.cat([stack(styled(rows, look)) for look in LOOKS])
    digits = torch.tensor([row.label for row in rows]).repeat(len(LOOKS))
    return images, digits, torch.arange(len(LOOKS)).repeat_interleave(len(rows))


def _train(
    images: Images, classes: Int[Tensor, "rows"], num_classes: int, epochs: int, seed: int
) -> Judge:
    order = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(num_classes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_LEARNING_RATE)
    num_steps = epochs * -(-len(images) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, num_steps)
    for _ in range(epochs):
        shuffled = torch.tensor(order.sample(range(len(images)), len(images)))
        for batch in shuffled.split(_BATCH_SIZE):
            loss = functional.cross_entropy(judge(_shifted(images[batch], order)), classes[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return judge.eval()


def _shifted(images: Images, order: random.Random) -> Images:
    """The batch moved by up to two pixels: few images must teach what does not depend on place."""
    shifts = [order.randint(-_LARGEST_SHIFT, _LARGEST_SHIFT) for _ in range(2)]
    return torch.roll(images, shifts, dims=(-2, -1))


@torch.no_grad()
def _logits(judge: Judge, images: Images) -> Float[Tensor, "rows classes"]:
    return judge(images.float().cpu())


def _accuracy(judge: Judge, images: Images, classes: Int[Tensor, "rows"]) -> float:
    return (_logits(judge, images).argmax(-1) == classes).double().mean().item()


@torch.no_grad()
def _features(judges: Judges, images: Images) -> numpy.ndarray:
    """(rows, features of both judges): what is drawn, and how."""
    embedded = [judge.embed(images.float().cpu()) for judge in (judges.digit, judges.style)]
    return torch.cat(embedded, 1).double().numpy()


def _resampled(rows: numpy.ndarray, draw: numpy.random.Generator) -> numpy.ndarray:
    return rows[draw.integers(len(rows), size=len(rows))]


def _frechet(ours: numpy.ndarray, theirs: numpy.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)).

    The last trace is the nuclear norm of X1 X2' for the centred samples X: no matrix root, and
    exact where there are fewer images than features.
    """
    centred = [(rows - rows.mean(0)) / max(len(rows) - 1, 1) ** 0.5 for rows in (ours, theirs)]
    roots = numpy.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    apart = float(numpy.square(ours.mean(0) - theirs.mean(0)).sum())
    traces = sum(float(numpy.square(part).sum()) for part in centred)
    return max(0.0, apart + traces - 2 * float(roots))
