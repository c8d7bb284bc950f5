"""What an image recipe stands for: a base that hosts adapters, what each learns from, its judges.

The verb `train` and the report know image models by this surface alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from loralab.config import ImagesSection, RunConfig
from loralab.data import Row
from loralab.errors import ConfigError
from loralab.events import Listener
from loralab.imaging import Sheet
from loralab.training import MakesObjective


@dataclass(frozen=True)
class Judgement:
    """What was seen of trained adapters.

    document: `evaluation/images.json`; its `metrics` are figures with 95 % intervals.
    rows: `evaluation/images.jsonl`, a row an image. sheets: images for the report.
    """

    document: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    sheets: Sequence[Sheet] = ()


@runtime_checkable
class ImageSubject(Protocol):
    """A base and what a recipe teaches it: an adapter for each kind of rows."""

    @property
    def model(self) -> nn.Module:
        """What hosts the adapters: a UNet."""
        ...

    @property
    def base(self) -> Path:
        """The folder that the model was read from."""
        ...

    @property
    def task(self) -> MakesObjective:
        """What the adapters minimise."""
        ...

    @property
    def rows(self) -> Mapping[str, Sequence[Row]]:
        """What each adapter learns from, by its name."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """The data, for the manifest: a resumed run must find them equal."""
        ...

    @property
    def example(self) -> str:
        """What `generate --image` may be asked to draw with the adapters."""
        ...

    def watch(self, folder: Path, step: int, listen: Listener) -> None:
        """Called after each step; whatever it draws changes nothing of the training."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained adapters in other formats than PEFT's, into their folders."""
        ...

    def judge(self, folder: Path, listen: Listener) -> Judgement:
        """Look at what the trained adapters do, with the model hosting all of them.

        folder: of the run, for images that people open.
        """
        ...


def foreign_keys(config: RunConfig, keys: Sequence[str], whose: str) -> list[str]:
    """Faults of keys of `[images]` that are set and that this subject does not read."""
    fields = ImagesSection.model_fields
    set_ = [key for key in keys if getattr(config.images, key) != fields[key].default]
    return [f"images.{key} is for {whose}" for key in set_]


def open_subject(config: RunConfig, listen: Listener, base: Path | None = None) -> ImageSubject:
    """The subject of an image recipe; a base that is trained at first use is trained here.

    base: the folder of a run's base, where it is known already.

    Raises `ConfigError` that names every setting that cannot be followed, `ModelError` for a base
    that cannot be found or read.
    """
    if config.method.kind != "lora":
        raise ConfigError(
            f"method.kind is {config.method.kind!r}: of image models only adapters are trained",
            "set method.kind to 'lora'.",
        )
    from loralab.runs.images.digits import is_digits, open_digit_styles
    from loralab.runs.images.latent import open_latent_style

    if is_digits(config):
        return open_digit_styles(config, listen, base)
    return open_latent_style(config, listen, base)
