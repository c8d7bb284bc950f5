"""`loralab train --grid`, and the LoRA runs of a comparison: many trainings in one pass.

Every run gets the folder that it would have alone, so everything that reads runs reads these too,
and each can be resumed alone.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.config import RunConfig, load_config
from loralab.errors import ConfigError, Interrupted
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.runs.folder import MANIFEST, Run, open_run
from loralab.runs.sinks import require_sinks
from loralab.runs.telling import event_facts
from loralab.runs.train import HELD_OUT, begin, conclude, start_of
from loralab.runs.workbench import (
    Workbench,
    base_model,
    open_workbench,
    settle_dtype,
    without_compiling,
)
from loralab.training import (
    SHARED,
    Failed,
    Finished,
    Started,
    StepDone,
    Stopped,
    fit_many,
    prepare_many,
)

MOST_RUNS = 64


def grid_of(
    recipe: str | Path, overrides: Sequence[str], grid: Sequence[str]
) -> dict[str, RunConfig]:
    """The settings of every combination of the grid's values, by a name for their folders.

    grid: `section.key=[value, value, ...]` each. Raises `ConfigError`.
    """
    axes = [_axis(each) for each in grid]
    found: dict[str, RunConfig] = {}
    for chosen in itertools.product(*axes):
        names = [override.partition(".")[2] for override in chosen]
        found["-".join(name.replace("=", "-") for name in names)] = load_config(
            recipe, (*overrides, *chosen)
        )
    if len(found) > MOST_RUNS:
        raise ConfigError(f"the grid has {len(found)} runs", f"give one of at most {MOST_RUNS}.")
    return found


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
    bench = workbench or open_workbench(configs[0], listen)
    known = {f: open_run(f) for f in folders if (f / MANIFEST).is_file()}
    check_same(known, dict(zip(folders, configs, strict=True)))
    waiting = [
        (config, folder)
        for config, folder in zip(configs, folders, strict=True)
        if folder not in known or not (known[folder].finished or known[folder].failed)
    ]
    if waiting:
        try:
            _pass(waiting, bench, listen, splits, halving)
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


def _axis(text: str) -> list[str]:
    """`section.key=[a, b]` -> `section.key=a`, `section.key=b`."""
    key, sign, values = text.partition("=")
    inner = values.strip()
    if not sign or not (inner.startswith("[") and inner.endswith("]")) or not inner[1:-1].strip():
        raise ConfigError(
            f"--grid {text!r} is not of the form section.key=[value, value]",
            "write for example --grid 'method.rank=[4,8,16]'.",
        )
    return [f"{key.strip()}={value.strip()}" for value in inner[1:-1].split(",")]


def _pass(
    waiting: Sequence[tuple[RunConfig, Path]],
    bench: Workbench,
    listen: Listener,
    splits: Sequence[str],
    halving: bool,
) -> None:
    """Train the runs that wait, each saved and evaluated as soon as it is over."""
    configs = [config for config, _ in waiting]
    trainables = prepare_many(
        base_model(configs[0]),
        [(config.method, config.training) for config in configs],
        task=configs[0].model.text_task,
        rows=bench.rows["train"],
        starts=[start_of(folder) for _, folder in waiting],
    )
    runs = [
        begin(config, folder, bench, trainable, splits)
        for (config, folder), trainable in zip(waiting, trainables, strict=True)
    ]
    facts: list[dict[str, Any]] = [{} for _ in runs]
    folders = [run.folder for run in runs]
    events = fit_many(
        trainables,
        [bench.rows["train"]] * len(runs),
        [bench.rows["validation"]] * len(runs),
        folders,
        halving=halving,
    )
    done = 0
    for number, event in events:
        name = folders[number].name
        match event:
            case Failed():
                runs[number].knowing(state="failed", cause=event.error.cause).record()
                listen(Note(f"{name} diverged: {event.error.cause}"))
                continue
            case Stopped():
                text = f"{name} stopped after step {event.step}: validation nll {event.nll:.4f}"
                listen(Note(f"{text} is in the worse half"))
                continue
            case Started() if not number:
                listen(Phase(f"training {len(runs)} runs in one pass", event.total_steps, "steps"))
            case StepDone() if event.step > done:
                done = event.step
                listen(Progress(done, f"loss {event.loss:.4f}"))
        facts[number] |= event_facts(event)
        if isinstance(event, Finished):
            conclude(runs[number], bench, trainables[number], facts[number], listen)
