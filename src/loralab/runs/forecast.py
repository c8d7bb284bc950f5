"""A run's memory: planned before it starts, measured at its largest step, compared at the end."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeVar

from loralab.config import RunConfig
from loralab.data import Encoded, Row
from loralab.errors import PlanError
from loralab.events import Listener, Note
from loralab.measuring import watch_peak
from loralab.planning import (
    Lever,
    Plan,
    Planner,
    find_device,
    levers,
    most_runs,
    pass_levers,
    plan_pass,
)
from loralab.reports import formats
from loralab.training import Event, StepDone, choose_device, lay_out, pieces_of

SLACK_BYTES = 32 * 2**20
"""Beside the error bar: tables and batches that a process holds whatever it trains."""

SHOWN_LEVERS = 4

T = TypeVar("T")


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
                "runs": plan.num_runs,
                "phase": plan.phase,
                "parts": plan.parts,
                "device": plan.device.name,
                "capacity_bytes": plan.device.capacity_bytes,
            }
        }

    def watching(self, events: Iterable[Event], listen: Listener) -> Iterator[Event]:
        """The same events; the planned step is measured on its way, and a wrong plan is told."""
        for _, event in self.watching_pass(((0, event) for event in events), listen):
            yield event

    def watching_pass(
        self, events: Iterable[tuple[int, T]], listen: Listener
    ) -> Iterator[tuple[int, T]]:
        """`watching` for the events of all runs of a pass, each with the run's number."""
        stream = iter(events)
        done = [0] * self.plan.num_runs
        item = next(stream, None)
        while item is not None:
            yield item
            number, event = item
            if isinstance(event, StepDone):
                done[number] = event.step
            if min(done) < self.step - 1 or self.measured_bytes is not None:
                item = next(stream, None)
                continue
            with watch_peak(choose_device(self.plan.config.training.device)) as watched:
                item = next(stream, None)
            if item is not None and isinstance(item[1], StepDone) and item[1].step == self.step:
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
    return _told(Forecast(plan, step), lambda: (levers(planner, plan), 0), listen)


def forecast_many(
    configs: Sequence[RunConfig], rows: Sequence[Encoded], listen: Listener
) -> Forecast | None:
    """`forecast` of runs in one pass: the step in which they have the most padded tokens together.

    The levers that a `PlanError` names are how many of the runs fit, and settings for all.
    """
    training = configs[0].training
    kind = choose_device(training.device).type
    if training.memory_plan == "off" or kind not in _PLANNED:
        return None
    step, batches = _largest_together(configs, rows)
    device = find_device(kind if training.device == "auto" else training.device)
    plan = plan_pass(configs, device, batches)

    def helpful() -> tuple[Sequence[Lever], int]:
        return pass_levers(configs, plan, batches), most_runs(configs, device, batches)

    return _told(Forecast(plan, step), helpful, listen)


def _told(
    made: Forecast, helpful: Callable[[], tuple[Sequence[Lever], int]], listen: Listener
) -> Forecast:
    """The forecast, told. helpful: the levers, and how many runs would fit; asked where it does
    not fit, which stops the run unless it shall only be warned."""
    listen(Note(sentence(made.plan), topic="memory-plan"))
    if not made.plan.fits:
        made.levers, fitting = helpful()
        refusal = too_large(made.plan, made.levers, fitting=fitting)
        if made.plan.config.training.memory_plan == "stop":
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
    whose = f" of {plan.num_runs} runs in one pass" if plan.num_runs > 1 else ""
    peak = f"{formats.data_size(plan.peak_bytes)} ± {formats.percent(plan.error_bar, 0)}"
    return (
        f"{kind} peak{whose}: {peak} of {formats.data_size(plan.device.capacity_bytes)} "
        f"({plan.phase}; {largest})"
    )


def too_large(plan: Plan, found: Sequence[Lever], *, fitting: int = 0) -> PlanError:
    """The error of a step that does not fit, with what would help.

    fitting: how many runs of a pass would.
    """
    helpful = [
        f"{' '.join(lever.settings)} (saves {formats.data_size(lever.saves_bytes)})"
        for lever in found
        if lever.settings
    ][:SHOWN_LEVERS]
    fewer = [f"at most {fitting} of the {plan.num_runs} runs in one pass"] if fitting else []
    advice = "; ".join([*fewer, *helpful]) or "a smaller model"
    step = f"a step of {plan.num_runs} runs" if plan.num_runs > 1 else "the step"
    return PlanError(
        f"{step} needs {formats.data_size(plan.needed_bytes)} with its error bar and the context "
        f"(peak {formats.data_size(plan.peak_bytes)}, {plan.phase}), and {plan.device.name} has "
        f"{formats.data_size(plan.usable_bytes)} to give",
        f'try {advice}; or training.memory_plan="warn" to start all the same.',
    )


def _largest_together(
    configs: Sequence[RunConfig], rows: Sequence[Encoded]
) -> tuple[int, list[list[Encoded]]]:
    """(number, rows of each run) of the step with the most padded tokens in one piece, up to the
    first validation."""
    layouts = [lay_out(rows, config.training) for config in configs]
    last = min(min(layout.validation_steps) for layout in layouts)
    orders = [layout.batches(1) for layout in layouts]  # no validation is after the first epoch
    steps = [[[rows[i] for i in order[at]] for order in orders] for at in range(last)]

    def tokens(batches: Sequence[Sequence[Encoded]]) -> int:
        pieces = [
            [_padded(piece) for piece in pieces_of(batch, config.training)]
            for config, batch in zip(configs, batches, strict=True)
        ]
        return max(sum(turn) for turn in zip_longest(*pieces, fillvalue=0))

    number = max(range(len(steps)), key=lambda at: tokens(steps[at]))
    return number + 1, steps[number]


def _largest(config: RunConfig, rows: Sequence[Encoded]) -> tuple[int, list[Encoded]]:
    """(number, rows) of the step with the most padded tokens up to the first validation."""
    layout = lay_out(rows, config.training)
    steps = layout.batches(1)[: min(layout.validation_steps)]
    batches = [[rows[index] for index in batch] for batch in steps]
    sizes = [_padded(batch) for batch in batches]
    number = max(range(len(sizes)), key=sizes.__getitem__)
    return number + 1, batches[number]


def _padded(rows: Sequence[Row]) -> int:
    """Tokens of a batch with what they are padded by."""
    return len(rows) * max(row.num_tokens for row in rows)
