"""Optional places for metrics beside metrics.jsonl: TensorBoard and Weights & Biases."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loralab.errors import ConfigError


@runtime_checkable
class Sink(Protocol):
    """Takes figures by name at a step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in the run directory's `tensorboard/`."""

    def __init__(self, folder: Path, step: int) -> None:
        _require("tensorboard")
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A W&B run; resumed under the same id."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], name: str) -> None:
        wandb = _require("wandb")
        self._run = wandb.init(
            project="loralab",
            name=name,
            id=name,
            resume="allow",
            reinit="create_new",  # runs in one pass have one each
            config=dict(settings),
            dir=str(folder),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(
    names: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    step: int,
    name: str | None = None,
) -> list[Sink]:
    """The sinks named in `training.sinks`; `step` steps were done before.

    name: what the run is called elsewhere; like its folder, where nothing is said.

    Raises `ConfigError` for a sink whose package is not installed.
    """
    made: list[Sink] = []
    for name in names:
        match name:
            case "tensorboard":
                made.append(TensorBoardSink(folder, step))
            case "wandb":
                made.append(WandbSink(folder, settings, name or folder.name))
    return made


def require_sinks(names: Sequence[str]) -> None:
    """Raise `ConfigError` before anything starts where a sink's package is missing."""
    for name in names:
        _require(name)


def _require(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise ConfigError(
            f"training.sinks names {package!r}, which is not installed",
            f"install it with `pip install 'loralab[{package}]'`, or take it out of the list.",
        ) from None
