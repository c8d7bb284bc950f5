"""Styles of handwritten digits: one class-conditional denoiser, an adapter for each style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from loralab.adapters import attach, detach
from loralab.config import FOLDER_ONLY, RunConfig
from loralab.data import Row, sample
from loralab.errors import ConfigError, ModelError, nearest
from loralab.events import Listener
from loralab.imaging import (
    DIGITS_BASE,
    STYLES,
    BaseRecipe,
    Denoiser,
    DenoisingTask,
    Digits,
    digits_base,
    is_trained,
    load_denoiser,
    load_digits,
    pillow,
    styled,
)
from loralab.runs.images.judging import judge_styles
from loralab.runs.images.subject import Judgement, foreign_keys
from loralab.training import lora_config

DATA = "digits"


@dataclass(frozen=True)
class DigitStyles:
    """An `ImageSubject`: the training digits in each style."""

    config: RunConfig
    base: Path
    denoiser: Denoiser
    digits: Digits
    rows: Mapping[str, Sequence[Row]]

    @property
    def model(self) -> nn.Module:
        """The UNet."""
        return self.denoiser.unet

    @property
    def task(self) -> DenoisingTask:
        """To say what noise was added, class by class."""
        return DenoisingTask(
            self.denoiser.scheduler,
            class_dropout=self.config.images.class_dropout,
            bfloat16=self.config.model.dtype == "bfloat16",
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Names and counts."""
        return {
            "name": DATA,
            "source": "scikit-learn, load_digits (UCI Optical Recognition of Handwritten Digits)",
            "train": len(next(iter(self.rows.values()))),
            "held_out": len(self.digits.held_out),
            "styles": list(self.config.images.styles),
        }

    @property
    def example(self) -> str:
        """A three in each style, and the base's."""
        return " ".join([*(f"3:{style}" for style in self.config.images.styles), "3"])

    def watch(self, folder: Path, step: int, listen: Listener) -> None:
        """Nothing is drawn on the way."""

    def export(self, folder: Path) -> None:
        """No other program has this base."""

    def judge(self, folder: Path, listen: Listener) -> Judgement:
        """Classifiers that saw real images only, on images that the adapters make."""
        return judge_styles(self.denoiser, self.digits, self.config.images, folder, listen)


def is_digits(config: RunConfig) -> bool:
    """Whether a recipe is about styles of digits: by its base, its data or its styles."""
    named = config.model.name == DIGITS_BASE or config.data.name == DATA
    return named or bool(config.images.styles)


def open_digit_styles(config: RunConfig, listen: Listener, base: Path | None = None) -> DigitStyles:
    """Check the settings, then get the base and the digits. Errors as `open_subject`."""
    _check(config)
    pillow()  # which the end of a run needs, minutes later
    digits = load_digits()
    if base is None:
        base = _base(config, listen)
    most = config.data.train_rows
    train = digits.train if most is None else sample(digits.train, most, "train")
    rows = {style: styled(train, style) for style in config.images.styles}
    return DigitStyles(config, base, load_denoiser(base), digits, rows)


def _check(config: RunConfig) -> None:
    styles, faults = config.images.styles, foreign_keys(config, FOLDER_ONLY, "a folder of images")
    if not styles:
        faults.append(f"images.styles is empty; known: {', '.join(STYLES)}")
    faults += [
        f"images.styles: unknown style {style!r}; {nearest(style, STYLES)}"
        for style in styles
        if style not in STYLES
    ]
    if len(set(styles)) < len(styles):
        faults.append("images.styles names a style twice")
    if config.data.name != DATA:
        given = config.data.name or config.data.train
        faults.append(f"data.name is {given!r}; this base learns styles of {DATA!r}")
    if config.model.dtype == "float16":
        faults.append("model.dtype is 'float16'; digits train in float32 or bfloat16")
    if faults:
        raise ConfigError("; ".join(faults), "`loralab train digits-styles` shows a whole recipe.")


def _base(config: RunConfig, listen: Listener) -> Path:
    name = config.model.name
    if name != DIGITS_BASE:
        if not Path(name).is_dir():
            raise ModelError(
                f"there is no image model {name!r}",
                f"give {DIGITS_BASE!r} (trained at first use), or a diffusers folder.",
            )
        return Path(name).absolute()
    recipe = BaseRecipe()
    if not is_trained(recipe.folder()):
        _check_targets(config, recipe)
    training = config.training
    return digits_base(recipe, device=training.device, threads=training.threads, listen=listen)


def _check_targets(config: RunConfig, recipe: BaseRecipe) -> None:
    """Raise `TargetError` before minutes are spent on the base that the adapters would not fit."""
    unet = cast(nn.Module, recipe.build().unet)
    attach(unet, lora_config(config.method, None), name="check")
    detach(unet, "check")
