"""`loralab compare`: sweep every method's rate, train the best with several seeds, give evidence.

    <folder>/config.toml, comparison.json, report.html
    <folder>/runs/<method>/rate-<rate>-seed-<seed>/    a run directory each
    <folder>/solo/<method>.json                        memory and time of a run alone

Everything that is finished is reused when the comparison is started again.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.config import MethodKind, RunConfig, load_config
from loralab.errors import ConfigError, Interrupted, OutputError, PlanError, TrainingError
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.files import write_json, write_text
from loralab.reports import write_comparison_report
from loralab.runs.evaluate import evaluate
from loralab.runs.folder import CONFIG, MANIFEST, Run, open_run
from loralab.runs.many import train_many
from loralab.runs.results import comparison_of, loss_curves
from loralab.runs.solo import measure
from loralab.runs.sweep import DEFAULT_RATES, Sweep, sweep
from loralab.runs.train import resume, train
from loralab.runs.workbench import Workbench, open_workbench, settle_dtype

LARGEST_SHARED_BATCH = 16
"""Rows up to which one pass of many runs is no slower than one after another (on two cores)."""

COMPARISON = "comparison.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Entrant:
    """What one method did in the contest."""

    method: MethodKind
    sweep: Sweep
    runs: tuple[Run, ...]  # at the best rate, one a seed; none where every rate diverged
    tried: tuple[Run, ...]  # every run of the sweep
    solo: dict[str, Any]


def compare(config: RunConfig, output: str | Path, *, listen: Listener = ignore) -> dict[str, Any]:
    """Compare `config.compare.methods` in the folder `output`; returns comparison.json's content.

    Started again on the same folder it continues; with other settings it is refused.
    Raises any `LoralabError`; `Interrupted` after Ctrl-C.
    """
    config.model.check_reads_text()
    folder = Path(output)
    if config.model.task == "causal" and "head" in config.compare.methods:
        raise ConfigError(
            "compare.methods names 'head', but a causal model has no task head",
            "take it out of compare.methods.",
        )
    config = _with_grids(_with_dtype(config, folder, listen))
    _claim(folder, config)
    if (folder / COMPARISON).is_file() and (folder / REPORT).is_file():
        listen(Note(f"{folder} is finished; nothing to train"))
        return json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
    contest = _Contest(config, folder, listen)
    try:
        entrants = contest.hold()
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"interrupted; what is finished is kept in {folder}",
            f"start it again: loralab compare {folder / CONFIG} --output {folder}",
        ) from None
    comparison = comparison_of(config, contest.bench, entrants)
    write_comparison_report(comparison, folder / REPORT, loss_curves=loss_curves(entrants))
    write_json(folder / COMPARISON, comparison)
    return comparison


def _with_dtype(config: RunConfig, folder: Path, listen: Listener) -> RunConfig:
    """The settings with the dtype chosen; a comparison that goes on keeps its choice."""
    if config.model.dtype == "auto" and (folder / CONFIG).is_file():
        return config.replace(model__dtype=load_config(folder / CONFIG).model.dtype)
    return settle_dtype(config, listen)


def _with_grids(config: RunConfig) -> RunConfig:
    """The settings with every method's grid written out."""
    given = config.compare.learning_rates
    grids = {
        method: list(given.get(method) or DEFAULT_RATES[method])
        for method in config.compare.methods
    }
    return config.replace(compare__learning_rates=grids)


def _claim(folder: Path, config: RunConfig) -> None:
    """Make `folder` this comparison's, or find that it is already."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        write_text(folder / CONFIG, config.to_toml())
        return
    if not (folder / CONFIG).is_file() or (folder / MANIFEST).is_file():
        raise OutputError(
            f"{folder} exists and holds no comparison", "choose another --output, or remove it."
        )
    differing = _differences(load_config(folder / CONFIG), config)
    if differing:
        listed = "\n".join(f"  - {line}" for line in differing)
        raise OutputError(
            f"{folder} holds a comparison with other settings\n{listed}",
            "choose another --output, or start it with the settings it has.",
        )


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    before, after = old.model_dump(), new.model_dump()
    return [
        f"{section}.{key}: {before[section][key]!r} there, {value!r} here"
        for section, table in after.items()
        for key, value in table.items()
        if before[section][key] != value
    ]


@dataclass
class _Contest:
    """A comparison under way."""

    config: RunConfig
    folder: Path
    listen: Listener
    head_rate: float | None = field(init=False)
    bench: Workbench = field(init=False)

    def hold(self) -> list[Entrant]:
        self.head_rate = self.config.training.head_learning_rate
        self.bench = open_workbench(self.config, self.listen)
        return [self._enter(method) for method in self._order()]

    def _order(self) -> list[MethodKind]:
        """`head` first: its best rate becomes the head rate of the others."""
        return sorted(self.config.compare.methods, key=lambda method: method != "head")

    def _enter(self, method: MethodKind) -> Entrant:
        compare = self.config.compare
        tried: dict[float, Run] = {}
        first = compare.seeds[0]
        rates = sorted(set(compare.learning_rates[method]))
        self._in_one_pass(method, [(rate, first) for rate in rates], halving=compare.stop_losers)
        found = sweep(
            compare.learning_rates[method],
            lambda rate: self._validation_loss(method, rate, tried),
            max_extensions=compare.max_extensions,
        )
        best = found.best_rate
        self.listen(Note(_sweep_line(method, found), warning=not found.bracketed))
        if method == "head" and self.head_rate is None:
            self.head_rate = best
        runs: tuple[Run, ...] = ()
        if math.isfinite(found.losses[best]):
            self._in_one_pass(method, [(best, seed) for seed in compare.seeds])
            runs = tuple(self._run(method, best, seed) for seed in compare.seeds)
        for run in runs:
            if run.finished and not run.has_evaluation("test"):
                evaluate(run, workbench=self.bench, listen=self.listen)
        kept = {run.folder for run in runs[:1]}
        for run in [*tried.values(), *runs]:
            if run.folder not in kept:
                _drop_large_files(run)
        solo = self._solo(self._settings(method, best, compare.seeds[0]))
        return Entrant(method, found, runs, tuple(tried.values()), solo)

    def _settings(self, method: MethodKind, rate: float, seed: int) -> RunConfig:
        return self.config.replace(
            method__kind=method,
            training__learning_rate=rate,
            training__head_learning_rate=rate if method == "head" else self.head_rate,
            training__seed=seed,
        )

    def _in_one_pass(
        self, method: MethodKind, wanted: Sequence[tuple[float, int]], *, halving: bool = False
    ) -> None:
        """Train LoRA's runs together where that pays; `_run` finds them done afterwards."""
        todo = [
            each
            for each in wanted
            if not (self._folder(method, *each) / MANIFEST).is_file()
            or not _is_over(open_run(self._folder(method, *each)))
        ]
        rows = self.config.training.batch_size
        if method != "lora" or len(todo) < 2 or (rows > LARGEST_SHARED_BATCH and not halving):
            return
        contest = wanted if halving else todo  # halving looks at those that are over, too
        try:
            train_many(
                [self._settings(method, *each) for each in contest],
                [self._folder(method, *each) for each in contest],
                listen=_only_progress(self.listen, f"{method}, {len(todo)} runs at once"),
                workbench=self.bench,
                splits=(),
                halving=halving,
            )
        except PlanError as error:
            self.listen(Note(f"{method}: the runs train one after another: {error.cause}"))

    def _folder(self, method: MethodKind, rate: float, seed: int) -> Path:
        return self.folder / "runs" / method / f"rate-{rate:.1e}-seed-{seed}"

    def _validation_loss(self, method: MethodKind, rate: float, tried: dict[float, Run]) -> float:
        run = tried[rate] = self._run(method, rate, self.config.compare.seeds[0])
        return float(run.manifest["best"]["nll"]) if run.finished else math.inf

    def _run(self, method: MethodKind, rate: float, seed: int) -> Run:
        """The run at its end, finished or diverged: reused, resumed or trained."""
        folder = self._folder(method, rate, seed)
        title = f"{method}, rate {rate:g}, seed {seed}"
        listen = _only_progress(self.listen, title)
        try:
            if not (folder / MANIFEST).is_file():
                config = self._settings(method, rate, seed)
                return train(config, folder, listen=listen, workbench=self.bench, splits=())
            run = open_run(folder)
            if run.finished or run.failed:
                return run
            return resume(folder, listen=listen, workbench=self.bench)
        except TrainingError as error:
            self.listen(Note(f"{title} diverged: {error.cause}"))
            return open_run(folder)

    def _solo(self, config: RunConfig) -> dict[str, Any]:
        """Memory and time of a run alone in a fresh process, measured once."""
        path = self.folder / "solo" / f"{config.method.kind}.json"
        if not path.is_file():
            self.listen(Phase(f"measuring {config.method.kind} alone in a fresh process"))
            write_json(path, measure(config, num_steps=self.config.compare.measured_steps))
        return json.loads(path.read_text(encoding="utf-8"))


def _is_over(run: Run) -> bool:
    return run.finished or run.failed


def _drop_large_files(run: Run) -> None:
    """Keep adapters, drop whole models: the first seed's at the best rate stays."""
    if (run.folder / "model").is_dir():
        shutil.rmtree(run.folder / "model")


def _sweep_line(method: str, found: Sweep) -> str:
    rates = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in found.losses.items())
    line = f"{method}: best learning rate {found.best_rate:g} (validation nll by rate: {rates})"
    return line if found.bracketed else f"{line}; it lies on an edge of the grid"


def _only_progress(listen: Listener, title: str) -> Callable[[Any], None]:
    """Of a single run's talk, a comparison shows the progress and the warnings.

    Not those of the learning rate: a sweep tries unlikely ones on purpose.
    """

    def hear(event: Any) -> None:
        match event:
            case Phase(title=said, total=total, unit=unit) if said.startswith("training"):
                listen(Phase(title, total, unit))
            case Progress():
                listen(event)
            case Note(warning=True, text=text, topic=topic) if topic != "learning-rate":
                listen(Note(f"{title}: {text}", warning=True))

    return hear
