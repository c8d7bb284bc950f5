"""`--grid section.key=[values]`: the settings of every combination, and what came of them."""

import itertools
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from loralab.config import RunConfig, load_config, toml_value
from loralab.errors import ConfigError, TrainingError
from loralab.reports import formats
from loralab.runs.folder import Run
from loralab.runs.tables import Table

MOST_RUNS = 64


def grid_of(
    recipe: str | Path, overrides: Sequence[str], grid: Sequence[str]
) -> dict[str, RunConfig]:
    """The settings of every combination of the grid's values, by a name for their folders.

    grid: `section.key=[value, value, ...]` each. Raises `ConfigError`.
    """
    axes = [_axis(each) for each in grid]
    _check_keys([axis[0].partition("=")[0] for axis in axes])
    combinations = list(itertools.product(*axes))
    if len(combinations) > MOST_RUNS:
        raise ConfigError(
            f"the grid has {len(combinations)} runs", f"give one of at most {MOST_RUNS}."
        )
    found: dict[str, RunConfig] = {}
    for chosen in combinations:
        name = "-".join(_name(override) for override in chosen)
        if name in found:
            raise ConfigError(
                f"the grid gives two runs the name {name}",
                "leave out values that are there twice, or train them one by one.",
            )
        found[name] = load_config(recipe, (*overrides, *chosen))
    return found


def _check_keys(keys: Sequence[str]) -> None:
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(
            f"--grid names {', '.join(twice)} twice", "give all its values in one list."
        )


def _axis(text: str) -> list[str]:
    """`section.key=[a, b]` -> `section.key=a`, `section.key=b`."""
    key, sign, values = text.partition("=")
    key, inner = key.strip(), values.strip()
    found: list[object] = []
    if sign and inner.startswith("[") and inner.endswith("]"):
        try:
            found = tomllib.loads(f"values = {inner}")["values"]
        except tomllib.TOMLDecodeError:
            found = []
    if not found:
        raise ConfigError(
            f"--grid {text!r} is not of the form section.key=[value, value]",
            "write for example --grid 'method.rank=[4,8,16]'; texts stand in quotes.",
        )
    if all(isinstance(value, int | float) for value in found):  # as they were written: 3e-4
        return [f"{key}={each.strip()}" for each in inner[1:-1].split(",") if each.strip()]
    return [f"{key}={toml_value(value)}" for value in found]


def _name(override: str) -> str:
    """What a folder is called after one setting: `method.rank=4` -> `rank-4`."""
    key, _, value = override.partition(".")[2].partition("=")
    return f"{key}-{re.sub(r'[^0-9A-Za-z_.+-]+', '_', value).strip('_')}"


def grid_table(runs: Sequence[Run]) -> Table:
    """One row a run of a grid, the best by validation first."""
    columns = ("run", "parameters", "steps", "best at", "validation nll", "test nll (95 %)", "")
    return columns, [
        (
            run.folder.name,
            formats.count(run.manifest["trainable_parameters"]),
            formats.exact(run.manifest.get("steps_done")),
            formats.exact(run.manifest.get("best", {}).get("step")),
            formats.number(_validation_nll(run), 4),
            _test_nll(run),
            "diverged" if run.failed else "ended early" if run.manifest["stopped_early"] else "",
        )
        for run in _best_first(runs)
    ]


def grid_lines(runs: Sequence[Run]) -> str:
    """Which run of a grid is best, and what to do next. Raises `TrainingError` where all failed."""
    best = _best_first(runs)[0]
    if best.failed:
        raise TrainingError(
            f"every run of the grid diverged; {best.folder.name}: {best.manifest['cause']}",
            "lower the learning rates, in another --output.",
        )
    finished = [run.folder for run in runs if run.finished]
    told = [best.folder.parent] if len(finished) == len(runs) else finished
    return (
        f"Best by validation: {best.artifact}\n{best.folder / 'report.html'}\n"
        f"Next: loralab lint {' '.join(quote(str(folder)) for folder in told)}"
    )


def _best_first(runs: Sequence[Run]) -> list[Run]:
    def place(run: Run) -> tuple[bool, float]:
        nll = _validation_nll(run)
        return run.failed, math.inf if nll is None else nll

    return sorted(runs, key=place)


def _validation_nll(run: Run) -> float | None:
    return run.manifest.get("best", {}).get("nll")


def _test_nll(run: Run) -> str:
    if not run.has_evaluation("test"):
        return formats.MISSING
    nll = run.metrics("test")["metrics"]["nll"]
    mean, low, high = (formats.number(nll[part], 3) for part in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})"
