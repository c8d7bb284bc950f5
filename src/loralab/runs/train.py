"""`loralab train`: prepare, train, save, evaluate, describe; and the same continued."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from loralab.adapters import save_adapter
from loralab.config import RunConfig
from loralab.errors import Interrupted, RunError, TrainingError
from loralab.events import Listener, Note, Phase, ignore
from loralab.files import replacing, write_text
from loralab.measuring import make_probes
from loralab.models import quiet
from loralab.reports import write_run_report
from loralab.runs.card import model_card
from loralab.runs.describe import run_report
from loralab.runs.evaluate import score, store_evaluation
from loralab.runs.folder import (
    ARTIFACT_OF,
    HEAD_FILE,
    MANIFEST,
    Run,
    create_run,
    default_folder,
    open_run,
    refuse_existing,
)
from loralab.runs.forecast import Forecast, forecast
from loralab.runs.images import resume_images, train_images
from loralab.runs.sinks import Sink, open_sinks, require_sinks
from loralab.runs.telling import event_facts, log, tell
from loralab.runs.workbench import Workbench, open_workbench, settle_compile, settle_dtype
from loralab.training import START_FILE, Started, Trainable, effective_step, fit

HELD_OUT = ("validation", "test")


def train(
    config: RunConfig,
    output: str | Path | None = None,
    *,
    listen: Listener = ignore,
    workbench: Workbench | None = None,
    splits: Sequence[str] = HELD_OUT,
) -> Run:
    """Train by `config` into the new folder `output`, and evaluate on `splits`.

    Nothing is written before data, model and settings have been found usable. A comparison hands
    in its `workbench` (data read once) and the splits it may look at.

    Raises any `LoralabError`; `Interrupted` after Ctrl-C, with a checkpoint and the command that
    resumes; `TrainingError` where the loss is no number.
    """
    if config.model.task == "image":
        return train_images(config, output, listen=listen)
    config = settle_dtype(config, listen)
    folder = default_folder(config) if output is None else Path(output)
    refuse_existing(folder)
    require_sinks(config.training.sinks)
    bench = workbench or open_workbench(config, listen)
    # a comparison measures each method by itself
    plan = None if workbench else forecast(config, bench.rows["train"], listen)
    trainable, facts = bench.trainable(config), plan.facts() if plan else {}
    if workbench is None:
        config, trainable, chosen = settle_compile(config, trainable, bench.rows["train"], listen)
        facts |= chosen
    run = begin(config, folder, bench, trainable, splits, facts)
    return _carry_out(run, bench, trainable, listen, plan)


def begin(
    config: RunConfig,
    folder: Path,
    bench: Workbench,
    trainable: Trainable,
    splits: Sequence[str],
    facts: dict[str, Any] | None = None,
) -> Run:
    """The run's folder, with what is known before the first step; one that is there is opened."""
    if (folder / MANIFEST).is_file():
        return open_run(folder)
    first_step = effective_step(trainable)
    run = create_run(
        folder,
        config,
        {
            "data": bench.facts,
            "label_names": list(bench.dataset.label_names),
            "trainable_parameters": trainable.num_trainable,
            "total_parameters": trainable.num_total,
            "base_parameters": trainable.num_base,
            "effective_step": first_step and first_step.to_dict(),
            "splits": list(splits),
            **(facts or {}),
        },
    )
    trainable.keep_start(start_of(folder))
    return run


def resume(
    folder: str | Path, *, listen: Listener = ignore, workbench: Workbench | None = None
) -> Run:
    """Continue the run in `folder` from its last checkpoint, bit for bit.

    Raises `RunError` where it is no run, `ResumeError` where the machine, the versions or the
    files are no longer those it was started with.
    """
    run = open_run(folder)
    if run.finished:
        listen(Note(f"{folder} is finished already"))
        return run
    if run.config.model.task == "image":
        return resume_images(run, listen=listen)
    bench = workbench or open_workbench(run.config, listen)
    if bench.facts != run.manifest["data"]:
        raise RunError(
            f"{folder}: the data have changed since the run was started",
            "put the files back as they were, or start a new run.",
        )
    trainable = bench.trainable(run.config, start_of(run.folder))
    return _carry_out(run, bench, trainable, listen)


def start_of(folder: Path) -> Path:
    """Where a run keeps what its adapter began with, until it is finished."""
    return folder / "checkpoints" / START_FILE


def _carry_out(
    run: Run,
    bench: Workbench,
    trainable: Trainable,
    listen: Listener,
    plan: Forecast | None = None,
) -> Run:
    try:
        return _train_and_evaluate(run, bench, trainable, listen, plan)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"interrupted; the state is saved in {run.folder}",
            f"loralab train --resume {run.folder}",
        ) from None


def _train_and_evaluate(
    run: Run, bench: Workbench, trainable: Trainable, listen: Listener, plan: Forecast | None
) -> Run:
    facts = _fit(run, bench, trainable, listen, plan)
    return conclude(run, bench, trainable, facts, listen)


def conclude(
    run: Run, bench: Workbench, trainable: Trainable, facts: dict[str, Any], listen: Listener
) -> Run:
    """Save what was trained, evaluate and describe it, and mark the run as finished."""
    facts |= _save(run, bench, trainable)
    evaluations = {}
    for split in run.manifest["splits"]:
        listen(Phase(f"evaluating {split}", None, "rows"))
        rows, figures = score(trainable.model, trainable.route, bench.rows[split], run.config)
        evaluations[split] = {"data": bench.dataset.name, "split": split, **figures}
        store_evaluation(run, split, rows, evaluations[split])
    run = run.knowing(state="finished", **facts)
    _describe(run, evaluations)  # before the manifest says so: a kill here is resumed
    run.record()
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    return run


def _fit(
    run: Run, bench: Workbench, trainable: Trainable, listen: Listener, plan: Forecast | None
) -> dict[str, Any]:
    """Train, telling the listener and the sinks; the facts that go into the manifest."""
    facts: dict[str, Any] = {}
    sinks: list[Sink] = []
    rows = bench.rows
    events = fit(trainable, rows["train"], rows["validation"], run.folder, prefixes=bench.prefixes)
    try:
        for event in events if plan is None else plan.watching(events, listen):
            if isinstance(event, Started):
                settings = run.config.model_dump()
                sinks = open_sinks(run.config.training.sinks, run.folder, settings, step=event.step)
            facts |= event_facts(event)
            tell(event, listen)
            log(event, sinks)
    except TrainingError as error:
        run.knowing(state="failed", cause=error.cause).record()
        raise
    finally:
        for sink in sinks:
            sink.close()
    return facts if plan is None else facts | plan.facts()


def _save(run: Run, bench: Workbench, trainable: Trainable) -> dict[str, Any]:
    """Save what was trained: an adapter in PEFT's format, a transformers folder, or the head."""
    kind, model = ARTIFACT_OF[run.config.method.kind], trainable.model
    folder = run.folder / kind
    if trainable.route:
        held_out = bench.rows["validation"] or bench.rows["train"]
        probes = make_probes(model, held_out, route=trainable.route)
        save_adapter(model, trainable.route, folder, probes=probes)
    else:
        with replacing(folder) as aside:
            aside.mkdir()
            if kind == "head":
                trained = {n: p.detach().contiguous() for n, p in trainable.parameters.items()}
                save_file(trained, aside / HEAD_FILE)
            else:
                _save_model(model, bench, aside)
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {"artifact": kind, "artifact_bytes": weights}


def _save_model(model: nn.Module, bench: Workbench, folder: Path) -> None:
    assert isinstance(model, PreTrainedModel)  # what the models room loads
    with quiet():
        model.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)


def _describe(run: Run, evaluations: dict[str, dict[str, Any]]) -> None:
    card = model_card(
        run.config, kind=run.manifest["artifact"], facts=run.manifest, evaluations=evaluations
    )
    write_text(run.artifact / "README.md", card)
    write_run_report(run_report(run), run.folder / "report.html")
