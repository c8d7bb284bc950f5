"""Many trainings in one pass: their steps over one base traced as one, and its levers."""

from collections.abc import Sequence

import torch
from torch import nn

from loralab.adapters import adapter_parameters, collector_paused, dropout_tables
from loralab.config import RunConfig
from loralab.data import Encoded
from loralab.errors import UntraceableError
from loralab.placement import planned_for
from loralab.planning.blocks import Run, find_runs
from loralab.planning.devices import Device
from loralab.planning.estimate import ESTIMATE_ERROR_BAR, estimate
from loralab.planning.levers import Lever, changes, helpful
from loralab.planning.plan import Plan, is_uneven
from loralab.planning.predict import accounts_of
from loralab.planning.sources import meta_model
from loralab.planning.steps import ModelSource, Ready, cut_down, faked, nothing, rows_for
from loralab.planning.trace import Tracer
from loralab.training import prepare, repeatable_pass

Rows = Sequence[Sequence[Encoded]]


class PackedStep:
    """The step of a pass: every run's adapter in one model, from `training.repeatable_pass`."""

    def __init__(self, configs: Sequence[RunConfig], source: ModelSource | None = None) -> None:
        self.model: nn.Module = meta_model(configs[0], source)
        self._trainables = [
            prepare(
                self.model,
                config.method,
                config.training,
                task=config.model.text_task,
                device=torch.device("meta"),
                name=f"run-{number}",
            )
            for number, config in enumerate(configs)
        ]
        self.runs = find_runs(self.model)

    def ready(self, tracer: Tracer, runs: Sequence[Run], rows: Rows) -> Ready:
        """The step on each run's rows of the cut model, to be run in the tracer's world."""
        model, fakes = faked(self.model, tracer, runs)
        cut = [cut_down(each, model, fakes, each.training) for each in self._trainables]
        routes = [str(each.route) for each in cut]
        for route in routes:
            tracer.label(adapter_parameters(model, route).values(), "adapters")
        tracer.label(fakes.values(), "weights")
        with tracer.building():
            for route in routes:
                tracer.label(dropout_tables(model, route), "dropout table")
            return Ready(repeatable_pass(cut, rows), model, before=nothing)


def plan_pass(
    configs: Sequence[RunConfig],
    device: Device,
    rows: Rows = (),
    *,
    model: ModelSource | None = None,
) -> Plan:
    """The plan of one step of LoRA trainings in one pass, on each run's `rows` where known.

    The settings must differ where runs in one pass may alone. As `Planner.plan`.
    """
    given = rows or [rows_for(config) for config in configs]
    with planned_for(device.type), collector_paused():
        source = PackedStep(configs, model)

        def made(*, whole: bool) -> Plan:
            accounts = accounts_of(
                lambda tracer, runs: source.ready(tracer, runs, given),
                source.runs,
                device,
                whole=whole,
            )
            return Plan(configs[0], device, "own", accounts, num_runs=len(configs))

        try:
            plan = made(whole=False)
            return made(whole=True) if is_uneven(plan, source.runs) else plan
        except UntraceableError as error:
            rows_a_step = sum(config.training.batch_size for config in configs)
            accounts = estimate(configs[0].replace(training__batch_size=rows_a_step), source.model)
            why = error.cause
            return Plan(
                configs[0], device, "own", accounts, ESTIMATE_ERROR_BAR, why, num_runs=len(configs)
            )


def most_runs(configs: Sequence[RunConfig], device: Device, rows: Rows) -> int:
    """How many of the runs, in the order given, fit the device in one pass."""
    fitting, too_many = 0, len(configs) + 1
    while too_many - fitting > 1:
        count = (fitting + too_many) // 2
        if plan_pass(configs[:count], device, rows[:count]).fits:
            fitting = count
        else:
            too_many = count
    return fitting


def pass_levers(configs: Sequence[RunConfig], plan: Plan, rows: Rows) -> list[Lever]:
    """What makes the pass smaller for all runs alike, largest first, each planned by itself."""
    first, *others = ([c for c in changes(config) if c.for_passes] for config in configs)
    found = []
    for change in first:
        if all(change in theirs for theirs in others):
            changed = [config.replace(**change.settings) for config in configs]
            found.append(change.lever(plan, plan_pass(changed, plan.device, rows)))
    return helpful(found)
