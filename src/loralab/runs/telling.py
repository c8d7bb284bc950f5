"""Events of a training as talk, as facts of the manifest, and as figures for sinks."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from loralab.events import Listener, Note, Phase, Progress
from loralab.runs.folder import Run
from loralab.runs.sinks import Sink, open_sinks
from loralab.training import (
    CheckpointSaved,
    Event,
    Examined,
    Failed,
    Finding,
    Finished,
    Started,
    StepDone,
    Stopped,
    Validated,
)


def event_facts(event: Event) -> dict[str, Any]:
    """What of an event belongs into the manifest."""
    match event:
        case Started():
            return {
                "order_hash": event.order_hash,
                "steps": event.total_steps,
                "environment": event.environment,
                "findings": [asdict(finding) for finding in event.findings],
            }
        case Finished():
            return {
                "steps_done": event.step,
                "best": {
                    "step": event.best_step,
                    "nll": event.best_nll,
                    "accuracy": event.best_accuracy,
                },
                "stopped_early": event.stopped_early,
            }
        case _:
            return {}


def tell(event: Event, listen: Listener) -> None:
    """An event of the training room as talk."""
    match event:
        case Started():
            for finding in event.findings:
                tell_finding(finding, listen)
            listen(Phase("training", event.total_steps, "steps"))
            if event.step:
                listen(Note(f"resumed after step {event.step}"))
            listen(Progress(event.step))
        case Examined():
            for finding in event.findings:
                tell_finding(finding, listen)
        case StepDone():
            listen(Progress(event.step, f"loss {event.loss:.4f}"))
        case Validated():
            best = " (best so far)" if event.best else ""
            right = "" if event.accuracy is None else f", accuracy {event.accuracy:.4f}"
            listen(Note(f"step {event.step}: validation nll {event.nll:.4f}{right}{best}"))
        case CheckpointSaved() | Finished():
            pass


def tell_finding(finding: Finding, listen: Listener) -> None:
    advice = f": {finding.next_step}" if finding.next_step else ""
    listen(Note(finding.message + advice, warning=finding.level != "info", topic=finding.name))


def log(event: Event, sinks: Sequence[Sink]) -> None:
    """The figures of a step or a validation, to every sink."""
    if isinstance(event, StepDone):
        rates = {f"learning_rate/{role}": rate for role, rate in event.learning_rates.items()}
        figures = {"train/loss": event.loss, "train/grad_norm": event.grad_norm, **rates}
    elif isinstance(event, Validated):
        figures = {"validation/nll": event.nll}
        if event.accuracy is not None:
            figures["validation/accuracy"] = event.accuracy
    else:
        return
    for sink in sinks:
        sink.log(event.step, figures)


class Story:
    """The events of runs in one pass: talk with the runs' names, their facts, figures for sinks."""

    def __init__(self, runs: Sequence[Run], listen: Listener) -> None:
        self.facts: list[dict[str, Any]] = [{} for _ in runs]
        self._runs = runs
        self._listen = listen
        self._sinks: list[list[Sink]] = [[] for _ in runs]
        self._losses: dict[int, float] = {}
        self._found: set[str] = set()
        self._left = set(range(len(runs)))
        self._total = 0

    def take(self, number: int, event: Event | Failed | Stopped) -> None:
        """One event of the run of that number."""
        run = self._runs[number]
        name = run.folder.name
        if isinstance(event, Failed):
            run.knowing(state="failed", cause=event.error.cause).record()
            text = f"{name} diverged: {event.error.cause}"
            self._listen(Note(text, warning=True, topic="diverged"))
            self._leave(number)
            return
        if isinstance(event, Stopped):
            text = f"{name} stopped after step {event.step}: validation nll {event.nll:.4f}"
            self._listen(Note(f"{text} is in the worse half"))
            return
        self.facts[number] |= event_facts(event)
        match event:
            case Started():
                self._begin(number, event)
            case Examined():
                self._find(name, event.findings)
            case StepDone():
                self._progress(number, event)
            case Validated():
                best = " (best so far)" if event.best else ""
                text = f"{name}, step {event.step}: validation nll {event.nll:.4f}{best}"
                self._listen(Note(text))
            case Finished():
                self._leave(number)
        log(event, self._sinks[number])

    def tell_phase(self) -> None:
        """Say what is under way: at the start, and after a run was evaluated between steps."""
        if self._left:
            count = len(self._left)
            runs = f"{count} runs in one pass" if count > 1 else "1 run"
            self._listen(Phase(f"training {runs}", self._total, "steps"))

    def close(self) -> None:
        """Close all sinks."""
        for sinks in self._sinks:
            for sink in sinks:
                sink.close()

    def _begin(self, number: int, event: Started) -> None:
        run = self._runs[number]
        self._sinks[number] = open_sinks(
            run.config.training.sinks,
            run.folder,
            run.config.tables(),
            step=event.step,
            name=f"{run.folder.parent.name}-{run.folder.name}",
        )
        self._find(run.folder.name, event.findings)
        self._total = max(self._total, event.total_steps)
        if number == len(self._runs) - 1:
            self.tell_phase()
        if event.step:
            self._listen(Note(f"{run.folder.name} goes on after step {event.step}"))

    def _find(self, name: str, findings: Sequence[Finding]) -> None:
        """Warnings under the name of the first run that has them; all are in the manifests."""
        for finding in findings:
            if finding.level != "info" and finding.message not in self._found:
                self._found.add(finding.message)
                tell_finding(replace(finding, message=f"{name}: {finding.message}"), self._listen)

    def _leave(self, number: int) -> None:
        self._left.discard(number)
        self._losses.pop(number, None)

    def _progress(self, number: int, event: StepDone) -> None:
        self._losses[number] = event.loss
        if number == max(self._losses):
            low, high = min(self._losses.values()), max(self._losses.values())
            self._listen(Progress(event.step, f"losses {low:.4f} to {high:.4f}"))
