"""`loralab plan`: what a training step needs, before anything is loaded."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab.config import MethodKind, RunConfig
from loralab.errors import LoralabError
from loralab.events import Listener, Note, Phase, ignore
from loralab.planning import (
    ModelSource,
    Plan,
    Planner,
    Quantity,
    Speed,
    StepKind,
    curve,
    find_device,
    largest,
    levers,
    plan_serving,
    speed_of,
    step_seconds,
    verify,
)
from loralab.reports import write_plan_report
from loralab.runs.workbench import settle_dtype

METHODS: tuple[MethodKind, ...] = ("lora", "frozen", "full", "head")


def plan(
    config: RunConfig,
    *,
    device: str = "auto",
    step: StepKind = "own",
    model: ModelSource | None = None,
    details: bool = False,
    check: bool = False,
    output: str | Path | None = None,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """The memory plan of `config`'s training step on `device`, as plain data.

    device: a name ("a10", "h100", "cpu"), or a size ("16GiB"). step: this project's own, or plain
    PEFT's ("peft"). model: a module, or what makes one, in the place of `model.name`; its weights
    are not read. details: methods side by side, the longest rows, the largest rank, serving and
    storage too. check: two real steps with random weights on the device that is here. output: an
    HTML page with the picture. Keys are explained in docs/planning.md.

    Raises `PlanError` and any other `LoralabError` of the settings.
    """
    config.model.check_reads_text()
    planned_for = find_device(device)
    if config.model.dtype == "auto":
        is_here = planned_for.name.partition(":")[0] in ("cpu", "cuda")
        config = (
            settle_dtype(config, listen) if is_here else config.replace(model__dtype="bfloat16")
        )
    planner = Planner(planned_for, step, model)
    listen(Phase("tracing a step"))
    made = planner.plan(config)
    if made.estimated:
        listen(Note(f"{made.estimated}; what follows is an estimate", warning=True))
    document = _document(planner, made, listen)
    if details or output is not None:
        document |= _details(planner, made, listen)
    if check:
        listen(Phase("two real steps with random weights"))
        checked = verify(config, step)
        document["verification"] = {**asdict(checked), "error": checked.error}
    if output is not None:
        write_plan_report(document, output)
    return document


def _document(planner: Planner, made: Plan, listen: Listener) -> dict[str, Any]:
    config, device = made.config, made.device
    listen(Phase("trying the levers"))
    pulled = [asdict(lever) for lever in levers(planner, made)]
    listen(Phase("finding the largest batch"))
    biggest = largest(planner, config, "batch_size")
    speed = speed_of(device, config.model.dtype)
    return {
        "model": config.model.name,
        "method": config.method.kind,
        "step": made.step,
        "peak_bytes": made.peak_bytes,
        "phase": made.phase,
        "parts": made.parts,
        "error_bar": made.error_bar,
        "estimated": made.estimated or None,
        "device": device.name,
        "capacity_bytes": device.capacity_bytes,
        "context_bytes": device.context_bytes,
        "usable_bytes": made.usable_bytes,
        "reserved_bytes": made.accounts.reserved,
        "fits": made.fits,
        "levers": pulled,
        "max_batch_size": biggest,
        "flops_per_step": round(made.accounts.flops),
        "seconds_per_step": _seconds(made, speed),
        "seconds_error_bar": speed.error_bar if speed else None,
        "timeline": curve(made),
    }


def _details(planner: Planner, made: Plan, listen: Listener) -> dict[str, Any]:
    config = made.config
    listen(Phase("comparing methods"))
    quantities: list[Quantity] = ["max_tokens"]
    if config.method.kind == "lora":
        quantities.append("rank")
    found = {f"max_{_short(name)}": largest(planner, config, name) for name in quantities}
    serving = plan_serving(
        config, made.device, num_adapters=config.compare.storage_tasks, model=planner.model
    )
    return {"methods": _methods(planner, config), **found, "serving": serving.to_dict()}


def _methods(planner: Planner, config: RunConfig) -> list[dict[str, Any]]:
    """A row a method that the model can be trained by, with the other settings alike."""
    rows = []
    for kind in METHODS:
        settings = config.replace(method__kind=kind)
        try:
            made = planner.plan(settings, quick=True)
        except LoralabError:  # a causal model has no head to train alone
            continue
        speed = speed_of(made.device, config.model.dtype)
        rows.append(
            {
                "method": kind,
                "trainable_parameters": planner.num_trained(settings),
                "peak_bytes": made.peak_bytes,
                "phase": made.phase,
                "fits": made.fits,
                "max_batch_size": largest(planner, settings, "batch_size"),
                "flops_per_step": round(made.accounts.flops),
                "seconds_per_step": _seconds(made, speed),
            }
        )
    return rows


def _seconds(made: Plan, speed: Speed | None) -> float | None:
    return None if speed is None else step_seconds(made.accounts, speed)


def _short(quantity: Quantity) -> str:
    return quantity.removeprefix("max_")
