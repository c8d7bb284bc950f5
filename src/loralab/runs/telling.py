"""Events of a training as talk, as facts of the manifest, and as figures for sinks."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loralab.events import Listener, Note, Phase, Progress
from loralab.runs.sinks import Sink
from loralab.training import (
    CheckpointSaved,
    Event,
    Examined,
    Finding,
    Finished,
    Started,
    StepDone,
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
