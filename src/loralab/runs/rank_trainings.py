"""The trainings around a choice of rank: one at a high rank, one at each rank, and refining."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loralab.adapters import Adapter, adapter_parameters, detach, extract, install, num_bytes
from loralab.config import RunConfig
from loralab.errors import ConfigError, OutputError, TrainingError
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.evidence import RowScores, loss_of, lost_rights
from loralab.runs.convert import convert
from loralab.runs.folder import MANIFEST, Run, open_run
from loralab.runs.subject import HeldOut, Subject, groups_of, open_subject
from loralab.runs.sweep import sweep
from loralab.runs.train import resume, train
from loralab.runs.workbench import Workbench, base_model, open_workbench, settle_dtype
from loralab.training import ADAPTER_NAME, StepDone, fit, prepare

HIGH_RANK = 64
REFINING_RATE = 0.3
"""Of the run's learning rate: the truncated adapter is near where it should be."""
OF_THE_MODULE = "source"


def train_high(
    config: RunConfig, output: Path, *, high: int, rates: Sequence[float], listen: Listener
) -> Run:
    """The run at rank `high` (at the best of `rates`, by validation) in `output`.

    The recipe's rank is converted, so that the first steps are the recipe's own. Runs that are
    there already are used, or continued.

    Raises `ConfigError` for a recipe of another method, `TrainingError` where every rate diverges.
    """
    if config.method.kind != "lora":
        raise ConfigError(
            f"method.kind is {config.method.kind!r}: only LoRA has a rank to choose",
            'set method.kind="lora".',
        )
    config.model.check_reads_text()
    bench = open_workbench(settle_dtype(config, listen), listen)
    at_high = _at_rank(bench.config, high)
    if not rates:
        listen(
            Note(
                f"trained at the recipe's rate {config.training.learning_rate:g};"
                " --rates tries several"
            )
        )
        return _run(at_high, output / "trained", bench, listen)
    tried: dict[float, Run] = {}

    def validation_loss(rate: float) -> float:
        folder = output / f"trained-rate-{rate:.1e}"
        try:
            tried[rate] = _run(_at_rate(at_high, rate), folder, bench, listen)
        except TrainingError as error:
            listen(Note(f"rate {rate:g} diverged: {error.cause}"))
            return math.inf
        return float(tried[rate].manifest["best"]["nll"])

    found = sweep(rates, validation_loss, max_extensions=config.compare.max_extensions)
    if found.best_rate not in tried:
        raise TrainingError("every learning rate diverged", "give smaller --rates.")
    told = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in found.losses.items())
    edge = "" if found.bracketed else "; it lies on an edge of the grid"
    listen(
        Note(
            f"best rate {found.best_rate:g} (validation nll: {told}){edge}",
            warning=not found.bracketed,
        )
    )
    return tried[found.best_rate]


def check_folder(output: Path) -> None:
    """Raises `OutputError` where the folder holds something else than trainings to go on with."""
    if output.is_dir() and all(child.name.startswith("trained") for child in output.iterdir()):
        return
    if output.exists():
        raise OutputError(f"{output} exists already", "choose another --output, or remove it.")


def _at_rank(config: RunConfig, rank: int) -> RunConfig:
    return convert(config, {"rank": rank}).config if rank != config.method.rank else config


def _at_rate(config: RunConfig, rate: float) -> RunConfig:
    return config.replace(training__learning_rate=rate)


def _run(config: RunConfig, folder: Path, bench: Workbench, listen: Listener) -> Run:
    """The finished run of these settings: found, continued or trained."""
    hear = _progress_of(folder.name, listen)
    if not (folder / MANIFEST).is_file():
        return train(config, folder, listen=hear, workbench=bench, splits=())
    run = open_run(folder)
    if run.config != config:
        raise OutputError(
            f"{folder} holds a run with other settings", "choose another --output, or remove it."
        )
    if run.failed:
        raise TrainingError(str(run.manifest["cause"]), "lower the learning rate.")
    return run if run.finished else resume(folder, listen=hear, workbench=bench)


def _progress_of(title: str, listen: Listener) -> Listener:
    """Of a training's talk, its progress and warnings."""

    def hear(event: Any) -> None:
        match event:
            case Phase(title="training", total=total, unit=unit):
                listen(Phase(title, total, unit))
            case Progress():
                listen(event)
            case Note(warning=True, text=text):
                listen(Note(f"{title}: {text}", warning=True))

    return hear


def trained_at(
    ranks: Sequence[int],
    subject: Subject,
    rows: HeldOut,
    cut: Mapping[int, Adapter],
    output: Path,
    listen: Listener,
) -> list[dict[str, Any]]:
    """A training at each rank beside the truncation to it, on the confirming rows.

    cut: by rank, the subject's adapter truncated to it. A run's settings are converted to each
    rank, so that the first steps are alike; the seed is the run's. `difference` is what training
    at the rank loses against truncating to it (negative: training there is better); its interval
    is over rows, for one seed.
    """
    run = subject.run
    if run is None:
        raise ConfigError(
            f"--trained trains at other ranks, and {subject.source} is no run",
            "give a run or a recipe.",
        )
    bench = open_workbench(run.config, ignore)
    groups = groups_of(rows.confirm)
    found = []
    for rank in ranks:
        here = run if rank == run.config.method.rank else None
        here = here or _run(
            _at_rank(run.config, rank), output / f"trained-rank-{rank}", bench, listen
        )
        own = open_subject(here.folder)
        scores = subject.scores(own.adapter, rows.confirm)
        row: dict[str, Any] = {
            "rank": rank,
            "parameters": own.adapter.num_parameters,
            "bytes": num_bytes(own.adapter),
            "trained": _figures(scores, groups),
            "truncated": None,
            "difference": None,
        }
        if rank in cut:
            other = subject.scores(cut[rank], rows.confirm)
            row["truncated"] = _figures(other, groups)
            row["difference"] = loss_of(other.nll, scores.nll, groups)
        found.append(row)
    return found


def _figures(scores: RowScores, groups: Any) -> dict[str, Any]:
    """Means with their 95 % intervals over rows."""
    zero = RowScores(scores.nll * 0, scores.correct * 0)
    return {
        "nll": loss_of(zero.nll, scores.nll, groups),
        "accuracy": lost_rights(zero.correct, scores.correct, groups),
    }


def refine(subject: Subject, adapter: Adapter, steps: int, listen: Listener) -> Adapter:
    """`adapter` trained for `steps` more steps on the run's training rows.

    At 0.3 of the run's learning rate, falling to zero; the rows' order is drawn anew. Raises
    `ConfigError` for an adapter that no run is known of.
    """
    if subject.run is None:
        raise ConfigError(
            f"--refine trains on the training rows, and {subject.source} is no run",
            "give a run or a recipe.",
        )
    config = _refining(subject.run.config, adapter, steps)
    bench = open_workbench(config, ignore)
    trainable = prepare(
        base_model(config), config.method, config.training, task=config.model.text_task
    )
    _fill(trainable.model, adapter)
    listen(Phase("refining", steps, "steps"))
    with tempfile.TemporaryDirectory(prefix="loralab-refine-") as folder:
        for event in fit(trainable, bench.rows["train"], (), Path(folder)):
            if isinstance(event, StepDone):
                listen(Progress(event.step, f"loss {event.loss:.4f}"))
    return extract(trainable.model, ADAPTER_NAME)


def _refining(config: RunConfig, adapter: Adapter, steps: int) -> RunConfig:
    shape = adapter.config
    rate, head = config.training.learning_rate, config.training.head_learning_rate
    return config.replace(
        method__rank=shape.rank,
        method__alpha=float(shape.alpha),
        method__rank_pattern=dict(shape.rank_pattern),
        method__alpha_pattern={name: float(alpha) for name, alpha in shape.alpha_pattern.items()},
        method__scaling=shape.scaling,
        method__init="kaiming",
        training__learning_rate=REFINING_RATE * rate,
        training__head_learning_rate=None if head is None else REFINING_RATE * head,
        training__max_steps=steps,
        training__epochs=max(config.training.epochs, steps),
        training__schedule="linear",
        training__warmup=0.0,
        training__patience=None,
        training__seed=config.training.seed + 1,
        training__memory_plan="off",
    )


@torch.no_grad()
def _fill(model: torch.nn.Module, adapter: Adapter) -> None:
    """The adapter's values in the place of those that `prepare` drew."""
    install(model, adapter, OF_THE_MODULE)
    values = adapter_parameters(model, OF_THE_MODULE)
    for name, parameter in adapter_parameters(model, ADAPTER_NAME).items():
        source = name.replace(f".adapters.{ADAPTER_NAME}.", f".adapters.{OF_THE_MODULE}.")
        parameter.copy_(values[source])
    detach(model, OF_THE_MODULE)


def truncations(whole: Any, ranks: Sequence[int]) -> Iterator[tuple[int, Adapter]]:
    """Each rank below the adapter's own, with the adapter truncated to it in every module."""
    for rank in ranks:
        if rank < whole.rank:
            yield rank, whole.truncated(whole.uniform_ranks(rank))
