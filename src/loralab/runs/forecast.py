"""A run's memory: planned before it starts, measured at its largest step, compared at the end."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.config import RunConfig
from loralab.data import Encoded
from loralab.errors import PlanError
from loralab.events import Listener, Note
from loralab.measuring import watch_peak
from loralab.planning import Lever, Plan, Planner, find_device, levers
from loralab.reports import formats
from loralab.training import Event, StepDone, choose_device, lay_out

SLACK_BYTES = 32 * 2**20
"""Beside the error bar: tables and batches that a process holds whatever it trains."""

SHOWN_LEVERS = 4


@dataclass
class Forecast:
    """The plan of the largest of a run's first steps, and what that step then took."""

    plan: Plan
    step: int  # counted from 1
    levers: Sequence[Lever] = ()
    measured_bytes: int | None = field(default=None, init=False)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        plan, measured = self.plan, self.measured_bytes
        return {
            "memory": {
                "step": self.step,
                "predicted_bytes": plan.peak_bytes,
                "measured_bytes": measured,
                "error": None if not measured else plan.peak_bytes / measured - 1,
                "error_bar": plan.error_bar,
                "phase": plan.phase,
                "parts": plan.parts,
                "device": plan.device.name,
                "capacity_bytes": plan.device.capacity_bytes,
            }
        }

    def watching(self, events: Iterable[Event], listen: Listener) -> Iterator[Event]:
        """The same events; the planned step is measured on its way, and a wrong plan is told."""
        stream = iter(events)
        done, event = 0, next(stream, None)
        while event is not None:
            yield event
            if isinstance(event, StepDone):
                done = event.step
            if done != self.step - 1 or self.measured_bytes is not None:
                event = next(stream, None)
                continue
            with watch_peak(choose_device(self.plan.config.training.device)) as watched:
                event = next(stream, None)
            if isinstance(event, StepDone):
                self.measured_bytes = watched.peak_bytes
                self._tell(listen)

    def _tell(self, listen: Listener) -> None:
        assert self.measured_bytes is not None
        predicted = self.plan.peak_bytes
        allowed = self.plan.error_bar * self.measured_bytes + SLACK_BYTES
        if abs(predicted - self.measured_bytes) > allowed:
            listen(
                Note(
                    f"step {self.step} took {formats.data_size(self.measured_bytes)} at its peak, "
                    f"the plan said {formats.data_size(predicted)}: more apart than its error bar "
                    f"of {formats.percent(self.plan.error_bar)}",
                    warning=True,
                    topic="memory-plan",
                )
            )


def forecast(config: RunConfig, rows: Sequence[Encoded], listen: Listener) -> Forecast | None:
    """The plan of the run's largest step before its first validation, told to the listener.

    None where `training.memory_plan` is "off", where frozen blocks are cached (their steps are
    not the method's own) and on devices that no plan is made for.

    Raises `PlanError` with the levers where the step does not fit and `training.memory_plan` is
    "stop".
    """
    training = config.training
    kind = choose_device(training.device).type
    if training.memory_plan == "off" or training.cache_frozen_prefix or kind not in _PLANNED:
        return None
    step, batch = _largest(config, rows)
    planner = Planner(find_device(kind if training.device == "auto" else training.device))
    plan = planner.plan(config, batch)
    made = Forecast(plan, step)
    listen(Note(sentence(plan), topic="memory-plan"))
    if not plan.fits:
        made.levers = levers(planner, plan)
        refusal = too_large(plan, made.levers)
        if training.memory_plan == "stop":
            raise refusal
        listen(Note(f"{refusal.cause}; {refusal.next_step}", warning=True, topic="memory-plan"))
    return made


_PLANNED = ("cpu", "cuda")


def sentence(plan: Plan) -> str:
    """A plan in one sentence."""
    largest = ", ".join(
        f"{kind} {formats.data_size(held)}" for kind, held in list(plan.parts.items())[:3]
    )
    kind = "estimated" if plan.estimated else "planned"
    return (
        f"{kind} peak: {formats.data_size(plan.peak_bytes)} ± {formats.percent(plan.error_bar, 0)} "
        f"of {formats.data_size(plan.device.capacity_bytes)} ({plan.phase}; {largest})"
    )


def too_large(plan: Plan, found: Sequence[Lever]) -> PlanError:
    """The error of a step that does not fit, with what would help."""
    helpful = [
        f"{' '.join(lever.settings)} (saves {formats.data_size(lever.saves_bytes)})"
        for lever in found
        if lever.settings
    ][:SHOWN_LEVERS]
    advice = "; ".join(helpful) or "a smaller model"
    return PlanError(
        f"the step needs {formats.data_size(plan.needed_bytes)} with its error bar and the context "
        f"(peak {formats.data_size(plan.peak_bytes)}, {plan.phase}), and {plan.device.name} has "
        f"{formats.data_size(plan.usable_bytes)} to give",
        f'try {advice}; or training.memory_plan="warn" to start all the same.',
    )


def _largest(config: RunConfig, rows: Sequence[Encoded]) -> tuple[int, list[Encoded]]:
    """(number, rows) of the step with the most padded tokens up to the first validation."""
    layout = lay_out(rows, config.training)
    steps = layout.batches(1)[: min(layout.validation_steps)]
    batches = [[rows[index] for index in batch] for batch in steps]
    sizes = [len(batch) * max(len(row.input_ids) for row in batch) for batch in batches]
    number = max(range(len(sizes)), key=sizes.__getitem__)
    return number + 1, batches[number]
