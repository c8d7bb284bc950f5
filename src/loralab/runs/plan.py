"""`loralab plan`: what a training step needs, before anything is loaded."""

from dataclasses import asdict
from typing import Any

from loralab.config import RunConfig
from loralab.events import Listener, Phase, ignore
from loralab.planning import ModelSource, Planner, StepKind, find_device, largest, levers


def plan(
    config: RunConfig,
    *,
    device: str = "auto",
    step: StepKind = "own",
    model: ModelSource | None = None,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """The memory plan of `config`'s training step on `device`, as plain data.

    device: a name ("a10", "h100", "cpu"), or a size ("16GiB"). step: this project's own, or plain
    PEFT's ("peft"). model: a module, or what makes one, in the place of `model.name`; its weights
    are not read. Keys: see `loralab plan --help` and docs/planning.md.

    Raises `PlanError` and any other `LoralabError` of the settings.
    """
    planner = Planner(find_device(device), step, model)
    listen(Phase("tracing a step"))
    made = planner.plan(config)
    listen(Phase("trying the levers"))
    pulled = levers(planner, made)
    listen(Phase("finding the largest batch"))
    biggest = largest(planner, config, "batch_size")
    return {
        "peak_bytes": made.peak_bytes,
        "phase": made.phase,
        "parts": made.parts,
        "error_bar": made.error_bar,
        "device": made.device.name,
        "capacity_bytes": made.device.capacity_bytes,
        "fits": made.fits,
        "levers": [asdict(lever) for lever in pulled],
        "max_batch_size": biggest,
        "flops_per_step": round(made.accounts.flops),
        "seconds_per_step": None,
    }
