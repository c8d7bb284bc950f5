"""From settings to the accounts of a training step, without a weight."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from loralab.config import RunConfig
from loralab.data import Encoded
from loralab.placement import planned_for
from loralab.planning.accounts import Accounts, account
from loralab.planning.blocks import Run, places_of
from loralab.planning.devices import Device
from loralab.planning.extend import extended
from loralab.planning.facts import rules_for
from loralab.planning.steps import Ready, Traceable, rows_for
from loralab.planning.timeline import Timeline
from loralab.planning.trace import Tracer, trace

TRACED_PASSES = 2
"""Of a step that accumulates: the first finds no gradients, and all others are like the second."""


def predict(
    config: RunConfig,
    device: Device,
    *,
    source: Traceable,
    rows: Sequence[Encoded] = (),
    whole: bool = False,
) -> Accounts:
    """The accounts of one training step of `config` on `device`.

    `source` is the step, made by `traceable` from settings that differ in batch and length at
    most. `rows` are the step's; without any they are made up by batch and length. Blocks that
    repeat are traced once and extended; `whole` traces every one.

    Raises `PlanError` for a step that cannot be traced.
    """
    passes = config.training.accumulation
    traced = passes if rows else min(passes, TRACED_PASSES)
    rows = rows or rows_for(config.replace(training__accumulation=traced))

    def ready(tracer: Tracer, kept: Sequence[Run]) -> Ready:
        return source.ready(tracer, kept, config, rows)

    accounts = accounts_of(ready, source.runs, device, whole=whole)
    return accounts if traced == passes else _repeated(accounts, passes / traced)


def accounts_of(
    ready: Callable[[Tracer, Sequence[Run]], Ready],
    runs: Sequence[Run],
    device: Device,
    *,
    whole: bool = False,
) -> Accounts:
    """The accounts of the step that `ready` makes of a model with the kept blocks of `runs`."""

    def few(kept: Sequence[Run]) -> Accounts:
        return account(timeline(ready, device, kept), device, kept)

    return few(runs) if whole else extended(few, runs)


def _repeated(accounts: Accounts, times: float | int) -> Accounts:
    """The same peaks from more passes. The optimiser's share of the rest is small."""
    return replace(
        accounts,
        flops=accounts.flops * times,
        num_ops=accounts.num_ops * times,
        allocated_bytes=accounts.allocated_bytes * times,
    )


def timeline(
    ready: Callable[[Tracer, Sequence[Run]], Ready], device: Device, runs: Sequence[Run]
) -> Timeline:
    """What a step of the model with the kept blocks allocates and frees."""
    tracer = Tracer(rules_for(device))
    with planned_for(device.type):
        made = ready(tracer, runs)
        return trace(tracer, made.step, places_of(made.model, runs), before=made.before)
