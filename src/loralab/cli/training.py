"""train, evaluate, generate, compare: models and what they do."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loralab.cli.common import (
    RECIPE_HELP,
    app,
    common,
    console_for,
    recipe_and_overrides,
    settings_of,
)

if TYPE_CHECKING:
    from loralab.console import Console


@app.command(epilog=RECIPE_HELP)
@recipe_and_overrides
@click.option("--output", type=click.Path(path_type=Path), help="The run's folder (must be new).")
@click.option(
    "--grid",
    multiple=True,
    metavar="SECTION.KEY=[VALUES]",
    help="Train every combination in one pass over one base (LoRA); --output holds a run each.",
)
@click.option(
    "--stop-losers",
    is_flag=True,
    help="With --grid: stop the worse half after a quarter, and again after half, of the steps.",
)
@click.option("--resume", type=click.Path(path_type=Path), help="Continue this run, bit for bit.")
@common
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    output: Path | None,
    grid: tuple[str, ...],
    stop_losers: bool,
    resume: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train one model by one method, evaluate it, write a report.

    \b
    Examples:
      loralab train demo method.rank=8 --output runs/rank-8
      loralab train --resume runs/rank-8
      loralab train digits-styles --output runs/styles    (an image model)
      loralab train demo --output runs/grid --grid 'training.learning_rate=[3e-4,1e-3]'

    With --grid the same command goes on where it was interrupted.
    """
    if resume is not None and (recipe is not None or output is not None or grid):
        raise click.UsageError("--resume takes its settings and place from the run alone")
    if stop_losers and not grid:
        raise click.UsageError("--stop-losers chooses among the runs of a --grid: give one")
    console = console_for(as_json, quiet)
    if grid:
        if output is None:
            raise click.UsageError("--grid needs --output: a folder that holds a run's folder each")
        _train_grid(console, recipe, overrides, model, output, grid, stop_losers, as_json)
        return
    if resume is not None:
        from loralab.runs.train import resume as resume_run

        run = resume_run(resume, listen=console.listen)
    else:
        config = settings_of(recipe, overrides, model)

        from loralab.runs.train import train as train_run

        run = train_run(config, output, listen=console.listen)
    if as_json:
        console.data(run.summary())
    else:
        from loralab.runs.tables import run_lines

        console.text(run_lines(run))


def _train_grid(
    console: "Console",
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    output: Path,
    grid: tuple[str, ...],
    stop_losers: bool,
    as_json: bool,
) -> None:
    """Every combination of the grid, a folder each under `output`."""
    settings_of(recipe, overrides, model)  # what is wrong with the recipe itself is said first

    from loralab.runs.grid import grid_lines, grid_of, grid_table
    from loralab.runs.many import train_many

    named = () if model is None else (f'model.name="{model}"',)
    configs = grid_of(str(recipe), (*overrides, *named), grid)
    folders = [output / name for name in configs]
    runs = train_many(list(configs.values()), folders, listen=console.listen, halving=stop_losers)
    told = grid_lines(runs)
    if as_json:
        console.data({"runs": [run.summary() for run in runs]})
        return
    console.table(*grid_table(runs))
    console.text(told)


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Other rows: a catalogue name, hub id, folder or file.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
)
@click.option("--forgetting", help="Text the base should keep: a text file, rows, a data set.")
@click.option(
    "--budget",
    type=float,
    help="With --forgetting: nats a token that may be forgotten.  [default: 0.02]",
)
@click.option("--base", help="With --forgetting: the base of an adapter that is no run.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="With --forgetting: a new folder for the chosen adapter and the report.",
)
@common
def evaluate(
    run: Path,
    data: str | None,
    split: str,
    forgetting: str | None,
    budget: float | None,
    base: str | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Score a finished run on held-out rows, with 95 % intervals.

    With --forgetting: what the adapter costs its base in log-likelihood of other text, and the
    weaker form of it (scaled, or its singular values capped) that stays within --budget.

    \b
    Examples:
      loralab evaluate runs/rank-8
      loralab evaluate runs/rank-8 --data tweets
      loralab evaluate runs/rank-8 --data mine.csv
      loralab evaluate runs/chat --forgetting general.txt --output milder
    """
    console = console_for(as_json, quiet)
    if forgetting is not None:
        _evaluate_forgetting(run, forgetting, data, base, budget, output, console)
        return
    if (base, budget, output) != (None, None, None):
        raise click.UsageError("--base, --budget and --output go with --forgetting")
    from loralab.runs.evaluate import evaluate as evaluate_run
    from loralab.runs.tables import evaluation_table

    result = evaluate_run(run, data=data, split=split, listen=console.listen)
    if as_json:
        console.data(result)
    else:
        console.table(*evaluation_table(result))


def _evaluate_forgetting(
    source: Path,
    keep: str,
    data: str | None,
    base: str | None,
    budget: float | None,
    output: Path | None,
    console: "Console",
) -> None:
    from loralab.runs.forgetting import BUDGET, forgetting
    from loralab.runs.tables import forgetting_table

    document = forgetting(
        source,
        keep,
        data=data,
        base=base,
        budget=BUDGET if budget is None else budget,
        output=output,
        listen=console.listen,
    )
    if console.as_json:
        console.data(document)
        return
    console.table(*forgetting_table(document))
    console.text(f"\n{document['verdict']}")
    for key in ("adapter", "report"):
        if key in document:
            console.text(document[key])


@app.command()
@click.argument("run", metavar="RUN|ADAPTER", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--base", help="Of an adapter: its base, where its file names none, or another.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    help="Draw with a run of an image model: PROMPT is CLASS[:ADAPTER[=WEIGHT][,...]] ...",
)
@common
def generate(
    run: Path,
    prompt: str,
    base: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    image: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a prompt with a language model, classify it with a classifier, or draw images.

    \b
    Examples:
      loralab generate runs/chat "Write a haiku about rank."
      loralab generate runs/rank-8 "A gripping film from start to end."
      loralab generate made/elsewhere "A gripping film" --base smollm2
      loralab generate runs/styles "3:bold 3:chalk 3 3:bold=0.5,chalk=0.5" --image threes.png
    """
    console = console_for(as_json, quiet)
    if image is not None and base is not None:
        raise click.UsageError("--base is for adapters of language models, --image for images")
    if image is not None:
        from loralab.runs.images import generate_images

        drawn = generate_images(run, prompt, image, seed=seed, listen=console.listen)
        if as_json:
            console.data(drawn)
        else:
            console.text(drawn["image"])
        return
    from loralab.runs.generate import generate as generate_from

    answer = generate_from(
        run,
        prompt,
        base=base,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        listen=console.listen,
    )
    if as_json:
        console.data(answer)
    else:
        console.text(answer["text"])


@app.command(epilog=RECIPE_HELP)
@recipe_and_overrides
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the comparison.")
@common
def compare(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare methods honestly: bracketed rates, several seeds, paired intervals, a verdict.

    Started again on the same folder it reuses every finished run.

    \b
    Examples:
      loralab compare demo
      loralab compare smollm2-reviews --output runs/reviews
      loralab compare demo data.name=tweets 'compare.seeds=[0,1,2,3,4]'
    """
    console = console_for(as_json, quiet)
    config = settings_of(recipe, overrides, model)

    from loralab.runs.compare import compare as compare_runs
    from loralab.runs.tables import comparison_table

    folder = output or Path("runs") / Path(str(recipe)).stem
    comparison = compare_runs(config, folder, listen=console.listen)
    if as_json:
        console.data(comparison)
        return
    console.table(*comparison_table(comparison))
    console.text(f"\n{comparison['verdict']}\n")
    console.text(f"{folder / 'comparison.json'}\n{folder / 'report.html'}")
