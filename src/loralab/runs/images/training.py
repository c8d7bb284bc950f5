"""`loralab train` of image models: every adapter of the recipe, in one pass over one base."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.adapters import count_parameters, save_adapter
from loralab.config import RunConfig
from loralab.errors import Interrupted, RunError, TrainingError
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.files import write_json_lines
from loralab.reports import write_image_report
from loralab.runs.folder import Run, create_run, default_folder, refuse_existing
from loralab.runs.images.evaluating import base_of, store_judgement
from loralab.runs.images.report import image_report
from loralab.runs.images.subject import ImageSubject, open_subject
from loralab.runs.sinks import Sink, open_sinks, require_sinks
from loralab.runs.telling import event_facts, tell_finding
from loralab.runs.workbench import settle_dtype
from loralab.training import (
    START_FILE,
    Event,
    Failed,
    Started,
    StepDone,
    Stopped,
    Trainable,
    effective_step,
    fit_many,
    prepare_many,
)

JOURNALS = ("metrics.jsonl", "timing.jsonl")


def train_images(
    config: RunConfig, output: str | Path | None = None, *, listen: Listener = ignore
) -> Run:
    """Train by `config` into the new folder `output`, judge what was learned, write the report.

    Each adapter lies in a folder of its name, in PEFT's format; the base stays where it is.

    Raises any `LoralabError`; `Interrupted` after Ctrl-C, with a checkpoint and the command that
    resumes; `TrainingError` where a loss is no number.
    """
    folder = default_folder(config) if output is None else Path(output)
    refuse_existing(folder)
    require_sinks(config.training.sinks)
    config = settle_dtype(config, listen)
    subject = open_subject(config, listen)
    trainables = _prepare(config, subject, folder)
    run = create_run(folder, config, _facts(subject, trainables))
    for name, trainable in trainables.items():
        trainable.keep_start(_work(folder, name) / "checkpoints" / START_FILE)
    return _carry_out(run, subject, trainables, listen)


def resume_images(run: Run, *, listen: Listener = ignore) -> Run:
    """Continue the run from its last checkpoint, bit for bit. Errors as `runs.train.resume`."""
    subject = open_subject(run.config, listen, base_of(run, listen))
    if dict(subject.facts) != run.manifest["data"]:
        raise RunError(
            f"{run.folder}: the data have changed since the run was started",
            "put the images back as they were, or start a new run.",
        )
    return _carry_out(run, subject, _prepare(run.config, subject, run.folder), listen)


def _prepare(config: RunConfig, subject: ImageSubject, folder: Path) -> dict[str, Trainable]:
    names = list(subject.rows)
    trainables = prepare_many(
        subject.model,
        [(config.method, config.training)] * len(names),
        task=subject.task,
        starts=[_work(folder, name) / "checkpoints" / START_FILE for name in names],
        names=names,
    )
    return dict(zip(names, trainables, strict=True))


def _facts(subject: ImageSubject, trainables: dict[str, Trainable]) -> dict[str, Any]:
    """What the manifest says before the first step."""
    trained = {name: trainable.num_trainable for name, trainable in trainables.items()}
    first = next(iter(trainables.values()))
    first_step = effective_step(first)
    return {
        "base": {"folder": str(subject.base)},
        "data": dict(subject.facts),
        "label_names": [],
        "splits": ["images"],
        "adapters": {name: {"trainable_parameters": count} for name, count in trained.items()},
        "trainable_parameters": sum(trained.values()),
        "base_parameters": first.num_base,
        "total_parameters": count_parameters(subject.model)[1],
        "effective_step": first_step and first_step.to_dict(),
    }


def _carry_out(
    run: Run, subject: ImageSubject, trainables: dict[str, Trainable], listen: Listener
) -> Run:
    try:
        facts = _fit(run, subject, trainables, listen)
        return _conclude(run, subject, facts, listen)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"interrupted; the state is saved in {run.folder}",
            f"loralab train --resume {run.folder}",
        ) from None


@dataclass
class _Telling:
    """The events of all adapters as one story: talk, the manifest's facts, figures for sinks."""

    run: Run
    names: list[str]
    listen: Listener
    sinks: list[Sink] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, name: str, event: Event) -> None:
        """One event of one adapter."""
        self.facts[name] = self.facts.get(name, {}) | event_facts(event)
        is_first, is_last = name == self.names[0], name == self.names[-1]
        if isinstance(event, Started) and is_first:
            config = self.run.config
            self.sinks = open_sinks(
                config.training.sinks, self.run.folder, config.tables(), step=event.step
            )
            for finding in event.findings:
                tell_finding(finding, self.listen)
            many = f"{len(self.names)} adapters in one pass: {', '.join(self.names)}"
            title = f"training {many if len(self.names) > 1 else name}"
            self.listen(Phase(title, event.total_steps, "steps"))
            if event.step:
                self.listen(Note(f"resumed after step {event.step}"))
            self.listen(Progress(event.step))
        elif isinstance(event, StepDone):
            self.losses[name] = event.loss
            for sink in self.sinks:
                sink.log(event.step, {f"{name}/loss": event.loss})
            if is_last:
                losses = ", ".join(f"{each} {loss:.4f}" for each, loss in self.losses.items())
                self.listen(Progress(event.step, f"loss {losses}"))


def _fit(
    run: Run, subject: ImageSubject, trainables: dict[str, Trainable], listen: Listener
) -> dict[str, Any]:
    """Train all adapters; what goes into the manifest."""
    names = list(trainables)
    telling = _Telling(run, names, listen)
    folders = [_work(run.folder, name) for name in names]
    rows = [subject.rows[name] for name in names]
    try:
        for number, event in fit_many(list(trainables.values()), rows, [()] * len(rows), folders):
            if isinstance(event, Failed):
                raise event.error
            assert not isinstance(event, Stopped)  # none is stopped for being worse
            telling.take(names[number], event)
            if isinstance(event, StepDone) and number == len(names) - 1:
                subject.watch(run.folder, event.step, listen)
    except TrainingError as error:
        run.knowing(state="failed", cause=error.cause).record()
        raise
    finally:
        for sink in telling.sinks:
            sink.close()
    return _of_all(run, telling.facts)


def _of_all(run: Run, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The adapters' facts side by side, and what is the same of all."""
    first = next(iter(facts.values()))
    shared = {key: first[key] for key in ("steps", "environment", "findings")}
    adapters = dict(run.manifest["adapters"])
    for name, own in facts.items():
        adapters[name] |= {key: value for key, value in own.items() if key not in shared}
    done = max(own["steps_done"] for own in adapters.values())
    return {**shared, "adapters": adapters, "steps_done": done}


def _conclude(run: Run, subject: ImageSubject, facts: dict[str, Any], listen: Listener) -> Run:
    """Save the adapters, judge them, describe the run, and mark it as finished."""
    for name in subject.rows:
        save_adapter(subject.model, name, run.folder / name)
        weights = (run.folder / name).glob("*.safetensors")
        facts["adapters"][name]["artifact_bytes"] = sum(file.stat().st_size for file in weights)
    subject.export(run.folder)
    facts["example"] = subject.example
    facts["artifact_bytes"] = sum(own["artifact_bytes"] for own in facts["adapters"].values())
    _join_journals(run, list(subject.rows))
    judgement = subject.judge(run.folder, listen)
    store_judgement(run, judgement)
    run = run.knowing(state="finished", **facts)
    write_image_report(image_report(run, judgement), run.folder / "report.html")
    run.record()  # last: a kill before it is resumed
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return run


def _join_journals(run: Run, names: list[str]) -> None:
    """The journals of all adapters in one, a row a step and an adapter."""
    for journal in JOURNALS:
        rows = [
            {"adapter": name, **json.loads(line)}
            for name in names
            for line in (_work(run.folder, name) / journal).read_text("utf-8").splitlines()
        ]
        rows.sort(key=lambda row: row["step"])
        write_json_lines(run.folder / journal, rows)


def _work(folder: Path, name: str) -> Path:
    """Where an adapter's journals and checkpoints lie until the run is finished."""
    return folder / "checkpoints" / name
