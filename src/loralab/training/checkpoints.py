"""Checkpoints that are whole or not there: written aside, brought to the disk, then renamed.

The two newest are kept, so that a kill at any moment leaves a whole one. Each is a folder with

    state.safetensors    trained values and AdamW's state (absent once the run is finished)
    best.safetensors     the trained values of the best validation so far
    checkpoint.json      everything else, with the SHA-256 of the two
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralab.errors import ResumeError
from loralab.files import cannot_write, replacing
from loralab.training.journal import START, Mark

STATE, BEST, MANIFEST = "state.safetensors", "best.safetensors", "checkpoint.json"
KEPT = 2

logger = logging.getLogger("loralab")


@dataclass
class Progress:
    """Where a run stands, without its tensors."""

    step: int = 0
    best_step: int = 0
    validations: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on. `identity` is what must be equal for equal bits."""

    progress: Progress
    identity: dict[str, Any]
    metrics: Mark = START
    timing: Mark = START
    state: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write `checkpoint`, then remove all but the two newest.

        Raises `OutputError` (a full disk, no permission); the older checkpoints stay as they were.
        """
        path = self.folder / f"step-{checkpoint.progress.step:08d}"
        before = self._paths()
        with replacing(path) as aside:
            aside.mkdir(parents=True)
            sums = {}
            if checkpoint.state:
                sums[STATE] = _write(aside / STATE, checkpoint.state)
            if checkpoint.best:
                same = _same_best(before, checkpoint.progress.best_step)
                sums[BEST] = _write_or_link(aside / BEST, checkpoint.best, same)
            manifest = {
                "progress": asdict(checkpoint.progress),
                "identity": checkpoint.identity,
                "metrics": asdict(checkpoint.metrics),
                "timing": asdict(checkpoint.timing),
                "sha256": sums,
            }
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for old in self._paths()[:-KEPT]:
            _remove_whole(old)
        return path

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, None where the run has none yet.

        A damaged one is left out with a warning. Raises `ResumeError` where all are damaged.
        """
        for leftover in self.folder.glob(".*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        faults = []
        for path in reversed(self._paths()):
            try:
                return _read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                faults.append(f"{path.name}: {error}")
                logger.warning("checkpoint %s is damaged and left out: %s", path, error)
                path.rename(path.with_name(f"damaged-{path.name}"))
        if faults:
            raise ResumeError(
                f"{self.folder}: every checkpoint is damaged ({'; '.join(faults)})",
                "start a new run in another folder.",
            )
        return None

    def steps(self) -> set[int]:
        """The steps that a run can go on from; 0 is one until a checkpoint has been removed."""
        paths = self._paths()
        kept = {int(path.name.removeprefix("step-")) for path in paths}
        return kept | ({0} if len(paths) < KEPT else set())

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are to be done again."""
        for path in self._paths():
            if int(path.name.removeprefix("step-")) > step:
                _remove_whole(path)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def check_identity(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `ResumeError` that lists everything in which this run differs from the saved one."""
    here = json.loads(json.dumps(here))
    differing = [
        f"{section}.{key} was {saved.get(section, {}).get(key)!r}, is {value!r}"
        for section, values in here.items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
    ]
    if differing:
        raise ResumeError(
            "the run cannot be continued bit for bit:\n"
            + "\n".join(f"  - {difference}" for difference in differing),
            "resume it where and as it was started, or start a new run in another folder.",
        )


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if _sha256(path / name) != expected:
            raise ValueError(f"{name} does not have the contents that were written")
    tensors = {name: load_file(path / name) for name in manifest["sha256"]}
    return Checkpoint(
        progress=Progress(**manifest["progress"]),
        identity=manifest["identity"],
        metrics=Mark(**manifest["metrics"]),
        timing=Mark(**manifest["timing"]),
        state=tensors.get(STATE, {}),
        best={name: tensor.clone() for name, tensor in tensors.get(BEST, {}).items()},
    )


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # it wraps the operating system's errors as text
        raise _as_os_error(path, error) from error
    return _sha256(path)


def _as_os_error(path: Path, error: SafetensorError) -> Exception:
    number = re.search(r"os error (\d+)", str(error))
    return cannot_write(path, OSError(int(number[1]) if number else errno.EIO, str(error)))


def _write_or_link(path: Path, tensors: dict[str, Tensor], same: Path | None) -> str:
    """The best values seldom change between checkpoints: an unchanged file is linked."""
    if same is not None:
        try:
            os.link(same / BEST, path)
            return json.loads((same / MANIFEST).read_text(encoding="utf-8"))["sha256"][BEST]
        except OSError:
            logger.debug("no hard links at %s; the best values are written again", path)
    return _write(path, tensors)


def _same_best(paths: list[Path], best_step: int) -> Path | None:
    if not paths:
        return None
    manifest = json.loads((paths[-1] / MANIFEST).read_text(encoding="utf-8"))
    same = manifest["progress"]["best_step"] == best_step and BEST in manifest["sha256"]
    return paths[-1] if same else None


def _remove_whole(path: Path) -> None:
    """Rename first: a half-removed folder must not look like a checkpoint."""
    aside = path.with_name(f".{path.name}.old")
    path.rename(aside)
    shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
