"""A run directory describes itself and is never half-written."""

import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loralab import __version__
from loralab.config import RunConfig, load_config
from loralab.errors import OutputError, RunError
from loralab.files import replacing, write_json

CONFIG = "config.toml"
MANIFEST = "manifest.json"
ARTIFACT_OF = {"lora": "adapter", "head": "head", "frozen": "model", "full": "model"}
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class Run:
    """A run on disk: its settings, what it recorded, and where its results lie."""

    folder: Path
    config: RunConfig
    manifest: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether training and evaluation ended; only then there is an artifact."""
        return self.manifest["state"] == "finished"

    @property
    def failed(self) -> bool:
        """Whether training ended in numbers that are none."""
        return self.manifest["state"] == "failed"

    @property
    def artifact(self) -> Path:
        """The trained adapter's or model's folder. Raises `RunError` for none, or several."""
        if self.config.model.task == "image" and self.finished:
            names = list(self.manifest["adapters"])
            raise RunError(
                f"{self.folder} is a run of an image model, with adapters {', '.join(names)}",
                "`evaluate` and `generate --image` take the run; `inspect`, `merge`, `combine`, "
                f"`explain` and `export` take one adapter, such as {self.folder / names[0]}; "
                "other verbs are for language models.",
            )
        folder = self.folder / ARTIFACT_OF[self.config.method.kind]
        if folder.is_dir():
            return folder
        self.check_finished()
        raise RunError(
            f"{self.folder}: its trained weights were removed after it was evaluated",
            "train it again in a new folder with the same config.toml.",
        )

    def check_finished(self) -> None:
        """Raise `RunError` where the run failed or is not over."""
        if self.failed:
            raise RunError(
                f"{self.folder}: the run failed: {self.manifest['cause']}",
                "train it again in a new folder, with a lower learning rate.",
            )
        if not self.finished:
            raise RunError(
                f"{self.folder}: the run is not finished",
                f"continue it with `loralab train --resume {self.folder}`.",
            )

    def metrics(self, split: str) -> dict[str, Any]:
        """The stored figures of a split ("validation" or "test")."""
        return json.loads(self._evaluation(split, "json").read_text(encoding="utf-8"))

    def predictions(self, split: str) -> list[dict[str, Any]]:
        """The stored rows of a split, one an example, in the data's order."""
        text = self._evaluation(split, "jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def has_evaluation(self, split: str) -> bool:
        """Whether the split was evaluated and stored."""
        return (self.folder / "evaluation" / f"{split}.json").is_file()

    def rows_of(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl (a row a step and a validation) or timing.jsonl (their seconds)."""
        text = (self.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def knowing(self, **facts: Any) -> "Run":
        """This run with `facts` added to its manifest, not yet on disk."""
        return Run(self.folder, self.config, {**self.manifest, **facts})

    def record(self) -> "Run":
        """This run, its manifest written to disk."""
        write_json(self.folder / MANIFEST, self.manifest)
        return self

    def summary(self) -> dict[str, Any]:
        """What `loralab train --json` prints."""
        evaluations = {
            split: self.metrics(split)
            for split in ("validation", "test", "images")
            if self.has_evaluation(split)
        }
        return {"run": str(self.folder), **self.manifest, "evaluation": evaluations}

    def _evaluation(self, split: str, suffix: str) -> Path:
        path = self.folder / "evaluation" / f"{split}.{suffix}"
        if not path.is_file():
            raise RunError(
                f"{self.folder}: the {split} rows were not evaluated",
                f"run `loralab evaluate {self.folder} --split {split}`.",
            )
        return path


def create_run(folder: Path, config: RunConfig, facts: dict[str, Any]) -> Run:
    """A new run directory holding config.toml and manifest.json.

    Raises `OutputError` where the folder exists and is not empty.
    """
    refuse_existing(folder)
    manifest = {
        "state": "started",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        **facts,
    }
    with replacing(folder) as aside:
        aside.mkdir()
        (aside / CONFIG).write_text(config.to_toml(), encoding="utf-8")
        write_json(aside / MANIFEST, manifest)
    return Run(folder, config, manifest)


def default_folder(config: RunConfig) -> Path:
    """Where a run goes that was given no place."""
    data = Path(config.data.name or str(config.data.train)).stem
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{data}-{config.method.kind}-{stamp}"


def refuse_existing(folder: Path) -> None:
    """Raise `OutputError` where `folder` exists and is not an empty directory."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if (folder / MANIFEST).is_file():
        raise OutputError(
            f"{folder} holds a run already",
            f"continue it with `loralab train --resume {folder}`, or choose another --output.",
        )
    if folder.exists():
        raise OutputError(f"{folder} exists already", "choose another --output, or remove it.")


def refuse_other_file(page: Path) -> None:
    """Raise `OutputError` where an HTML page would replace what is none."""
    if page.exists() and not (page.is_file() and page.suffix.lower() in (".html", ".htm")):
        raise OutputError(
            f"{page} exists already and is no page", "name a file that ends in .html as --output."
        )


def open_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises `RunError` where it is none."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() or not (folder / CONFIG).is_file():
        nearby = sorted(str(m.parent) for m in folder.parent.glob(f"*/{MANIFEST}"))
        known = f" Runs beside it: {', '.join(nearby[:5])}." if nearby else ""
        raise RunError(
            f"{folder} is no run (no {CONFIG} and {MANIFEST} in it)",
            f"give the folder that `loralab train --output` wrote.{known}",
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(
            f"{folder / MANIFEST} is damaged ({error})", "train again in a new folder."
        ) from None
    return Run(folder, load_config(folder / CONFIG), manifest)


def versions() -> dict[str, str]:
    """The versions a number depends on."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    found = {package: version(package) for package in packages}
    return {"loralab": __version__, "python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """The machine a number was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
