"""`loralab train --grid`, and the LoRA runs of a comparison: many trainings in one pass.

Every run gets the folder that it would have alone, so everything that reads runs reads these too,
and each can be resumed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loralab.config import RunConfig
from loralab.data import Encoded
from loralab.errors import ConfigError, Interrupted
from loralab.events import Listener, ignore
from loralab.runs.folder import MANIFEST, Run, open_run, refuse_existing
from loralab.runs.forecast import forecast_many
from loralab.runs.sinks import require_sinks
from loralab.runs.telling import Story
from loralab.runs.train import HELD_OUT, begin, conclude, start_of
from loralab.runs.workbench import (
    Workbench,
    base_model,
    open_workbench,
    settle_dtype,
    without_compiling,
)
from loralab.training import SHARED, Contender, Finished, fit_many, lay_out, prepare_many


def train_many(
    configs: Sequence[RunConfig],
    folders: Sequence[Path],
    *,
    listen: Listener = ignore,
    workbench: Workbench | None = None,
    splits: Sequence[str] = HELD_OUT,
    halving: bool = False,
) -> list[Run]:
    """Train all of `configs` over one base, in one pass; each run in its own folder.

    Called again with the same folders, it leaves out what is finished and continues the rest.
    halving: stop the worse half after a quarter, and again after half, of the steps.

    Raises `ConfigError` that names every setting in which the runs must not differ; otherwise as
    `train`. A run whose loss is no number is marked as failed; the others go on.
    """
    for config in configs:
        config.model.check_reads_text()
    configs = [without_compiling(settle_dtype(config, listen), listen) for config in configs]
    check_alike(configs)
    for config in configs:
        require_sinks(config.training.sinks)
    known = {f: open_run(f) for f in folders if (f / MANIFEST).is_file()}
    check_same(known, dict(zip(folders, configs, strict=True)))
    for folder in folders:
        if folder not in known:
            refuse_existing(folder)
    bench = workbench or open_workbench(configs[0], listen)
    if halving:
        _check_validations(configs, bench.rows["train"])
    over = [run for run in known.values() if run.finished or run.failed]
    done = {run.folder for run in over}
    waiting = [
        (config, folder)
        for config, folder in zip(configs, folders, strict=True)
        if folder not in done
    ]
    if waiting:
        try:
            ended = [_contender(run, bench.rows["train"]) for run in over] if halving else []
            asked = _Asked(splits, halving, ended)
            _pass(waiting, bench, listen, asked)
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(
                f"interrupted; every run's state is saved in {folders[0].parent}",
                "start the same command again, or one run with `loralab train --resume FOLDER`.",
            ) from None
    return [open_run(folder) for folder in folders]


def check_alike(configs: Sequence[RunConfig]) -> None:
    """Raise `ConfigError` that lists all settings in which runs of one pass must not differ."""
    first = configs[0].model_dump()
    faults = [
        f"{section}.{key}: {first[section][key]!r} and {value!r}"
        for config in configs[1:]
        for section, table in config.model_dump().items()
        for key, value in table.items()
        if value != first[section][key] and _is_shared(section, key)
    ]
    kinds = {config.method.kind for config in configs}
    if kinds != {"lora"}:
        faults.append(f"method.kind: {', '.join(sorted(kinds))}; only lora leaves the base alone")
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in dict.fromkeys(faults))
        raise ConfigError(
            f"runs in one pass share a model and its rows, but differ in\n{listed}",
            "give the runs these settings alike, or train them one by one.",
        )


def _check_validations(configs: Sequence[RunConfig], rows: Sequence[Encoded]) -> None:
    """Raise `ConfigError` where halving could stop nothing: no validation before the last step."""
    layouts = [lay_out(rows, config.training) for config in configs]
    if all(layout.validation_steps == {layout.total_steps} for layout in layouts):
        raise ConfigError(
            "losers can be stopped at a validation only, and the runs have one, at their end",
            "set training.evaluations_per_epoch to 4 or so.",
        )


def _contender(run: Run, train_rows: Sequence[Encoded]) -> Contender:
    """A run that is over, as halving sees it."""
    rows = run.rows_of("metrics.jsonl")
    last = max((row["step"] for row in rows), default=0)
    return Contender(
        name=run.folder.name,
        total_steps=lay_out(train_rows, run.config.training).total_steps,
        validations={r["step"]: r["validation_nll"] for r in rows if "validation_nll" in r},
        ended_at=last + 1 if run.failed else last,
    )


def check_same(known: dict[Path, Run], wanted: dict[Path, RunConfig]) -> None:
    """Raise `ConfigError` where a folder holds a run with other settings."""
    faults = [str(folder) for folder, run in known.items() if run.config != wanted[folder]]
    if faults:
        raise ConfigError(
            f"{', '.join(faults)}: a run with other settings lies there",
            "choose another --output, or start it with the settings it has.",
        )


def _is_shared(section: str, key: str) -> bool:
    return section in ("model", "data") or (section == "training" and key in SHARED)


@dataclass(frozen=True)
class _Asked:
    """What a pass is to do beside training."""

    splits: Sequence[str]
    halving: bool
    ended: Sequence[Contender]


def _pass(
    waiting: Sequence[tuple[RunConfig, Path]], bench: Workbench, listen: Listener, asked: _Asked
) -> None:
    """Train the runs that wait, each saved and evaluated as soon as it is over."""
    configs = [config for config, _ in waiting]
    rows = bench.rows
    is_new = not any((folder / MANIFEST).is_file() for _, folder in waiting)
    plan = forecast_many(configs, rows["train"], listen) if is_new else None
    trainables = prepare_many(
        base_model(configs[0]),
        [(config.method, config.training) for config in configs],
        task=configs[0].model.text_task,
        rows=rows["train"],
        starts=[start_of(folder) for _, folder in waiting],
    )
    runs = [
        begin(config, folder, bench, trainable, asked.splits, plan.facts() if plan else None)
        for (config, folder), trainable in zip(waiting, trainables, strict=True)
    ]
    story = Story(runs, listen)
    events = fit_many(
        trainables,
        [rows["train"]] * len(runs),
        [rows["validation"]] * len(runs),
        [run.folder for run in runs],
        halving=asked.halving,
        ended=asked.ended,
    )
    try:
        for number, event in events if plan is None else plan.watching_pass(events, listen):
            story.take(number, event)
            if isinstance(event, Finished):
                facts = story.facts[number] | (plan.facts() if plan else {})
                conclude(runs[number], bench, trainables[number], facts, listen)
                story.tell_phase()
    finally:
        story.close()
