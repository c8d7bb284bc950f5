"""rank: how much of an adapter is enough."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from loralab.cli.common import RECIPE_HELP, app, common, console_for
from loralab.errors import ConfigError

if TYPE_CHECKING:
    from loralab.console import Console

Number = TypeVar("Number", int, float)


@app.command(epilog=RECIPE_HELP)
@click.argument("source", metavar="RUN|ADAPTER|RECIPE")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--data", help="Held-out rows: a file, catalogue name, hub id or folder.")
@click.option("--base", help="The base model of an adapter that is no run.")
@click.option(
    "--tolerance",
    type=float,
    default=0.01,
    show_default=True,
    help="Mean log-likelihood that may be lost, in nats.",
)
@click.option(
    "--rule",
    type=click.Choice(["uniform", "global"]),
    default="uniform",
    show_default=True,
    help="Decide on one rank for all modules, or on one threshold that gives each its own.",
)
@click.option("--ranks", help="Ranks to try, such as 32,16,8; else half octaves down to 1.")
@click.option(
    "--high",
    type=click.IntRange(min=2),
    help="The rank that a recipe is trained at.  [default: 64]",
)
@click.option("--rates", help="Learning rates to choose from for a recipe, such as 3e-4,1e-3.")
@click.option("--trained", help="Train at these ranks too and compare, such as 8,16,32,64.")
@click.option("--refine", type=click.IntRange(min=0), default=0, help="Steps of refining after.")
@click.option("--advice", is_flag=True, help="Of a recipe: bits in the data; trains nothing.")
@click.option("--output", type=click.Path(path_type=Path), help="A new folder for the results.")
@common
def rank(
    source: str,
    overrides: tuple[str, ...],
    data: str | None,
    base: str | None,
    tolerance: float,
    rule: Literal["uniform", "global"],
    ranks: str | None,
    high: int | None,
    rates: str | None,
    trained: str | None,
    refine: int,
    advice: bool,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Which rank is enough? One adapter, cut to every rank, and what that loses on held-out rows.

    Chooses the smallest rank whose loss is below --tolerance with 95 % confidence, confirms it on
    rows that had no part in choosing, and writes that adapter in PEFT's format. A RECIPE is first
    trained once at rank --high. docs/rank.md says how the choice is made.

    \b
    Examples:
      loralab rank runs/rank-64 --output smaller
      loralab rank my-adapter --base smollm2 --data held-out.csv --tolerance 0.02
      loralab rank demo --advice
      loralab rank demo --high 32 --rates 3e-4,1e-3,3e-3 --trained 8,16 --output runs/rank
    """
    console = console_for(as_json, quiet)
    if advice:
        _advise(source, overrides, console)
        return
    if (high is not None or rates) and Path(source).is_dir():
        raise click.UsageError(f"--high and --rates train a recipe; {source} is trained already")
    tried = _numbers(ranks, "--ranks", int)

    from loralab.runs.rank import HIGH_RANK, RANKS, rank as choose_rank
    from loralab.runs.tables import rank_table, trained_table

    document = choose_rank(
        source,
        data=data,
        base=base,
        overrides=overrides,
        tolerance=tolerance,
        rule=rule,
        ranks=tried or RANKS,
        high=high or HIGH_RANK,
        rates=_numbers(rates, "--rates", float),
        trained=_numbers(trained, "--trained", int),
        refine_steps=refine,
        output=output,
        listen=console.listen,
    )
    if as_json:
        console.data(document)
        return
    console.table(*rank_table(document))
    if document.get("trained"):
        console.text("")
        console.table(*trained_table(document))
    console.text(f"\n{document['verdict']}")
    for key in ("adapter", "report"):
        if key in document:
            console.text(document[key])


def _advise(recipe: str, overrides: tuple[str, ...], console: "Console") -> None:
    from loralab.config import load_config
    from loralab.runs.advice import advice
    from loralab.runs.tables import capacity_table

    document = advice(load_config(recipe, overrides), listen=console.listen)
    if console.as_json:
        console.data(document)
        return
    console.table(*capacity_table(document))
    console.text("")
    console.text("\n".join(document["sentences"]))


def _numbers(text: str | None, option: str, kind: type[Number]) -> list[Number]:
    """`"8,16"` -> numbers. Raises `ConfigError`."""
    try:
        return [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is no list of numbers", f"write for example {option} 8,16,32."
        ) from None
