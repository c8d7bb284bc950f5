"""A plan against reality: the same step with random weights on the device that is here.

In a fresh process, since a process that has trained before holds more than a step does:
`python -m loralab.planning.verify CONFIG STEP DEVICE` prints one JSON document.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loralab.config import RunConfig, load_config
from loralab.errors import PlanError
from loralab.measuring import median_step_seconds, peak_live_bytes
from loralab.planning.devices import find_device
from loralab.planning.plan import Planner
from loralab.planning.speed import speed_of, step_seconds
from loralab.planning.steps import StepKind, real_step
from loralab.training import use_threads


@dataclass(frozen=True)
class Verification:
    """What was predicted and what was measured, in bytes; error: relative, above 0 where the
    prediction was too high."""

    device: str
    predicted_bytes: int
    measured_bytes: int
    step_seconds: float | int
    predicted_seconds: float | int | None = None

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_bytes / self.measured_bytes - 1


def verify(config: RunConfig, step: StepKind = "own", device: str = "auto") -> Verification:
    """Plan `config`'s step for the present device, and run it there with random weights.

    Raises `PlanError` where the step fails there, with what the process said.
    """
    present = find_device(device)
    predicted = Planner(present, step).plan(config)
    use_threads(config.training)
    speed = speed_of(present, config.model.dtype)
    measured = _in_fresh_process(config, step, present.type)
    return Verification(
        device=present.name,
        predicted_bytes=predicted.peak_bytes,
        predicted_seconds=None if speed is None else step_seconds(predicted.accounts, speed),
        **measured,
    )


def _in_fresh_process(config: RunConfig, step: StepKind, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="loralab-verify-") as folder:
        recipe = Path(folder) / "config.toml"
        recipe.write_text(config.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(recipe), step, device]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise PlanError(
            f"the step failed on {device}: {last[0]}",
            "where it ran out of memory, verify a smaller batch or length.",
        )
    return json.loads(ran.stdout)


def measure_here(config: RunConfig, step: StepKind, device: str) -> dict[str, Any]:
    """`measured_bytes` and `step_seconds` of the step in this process."""
    place = torch.device(device)
    use_threads(config.training)
    run = real_step(config, step, place)
    measured = peak_live_bytes(run, device=place)
    seconds = median_step_seconds(run, device=place, warmup=0, repeats=3)
    return {"measured_bytes": measured, "step_seconds": seconds}


if __name__ == "__main__":
    recipe, step, device = sys.argv[1:4]
    kind: StepKind = "peft" if step == "peft" else "own"
    sys.stdout.write(json.dumps(measure_here(load_config(recipe), kind, device)))
