"""rank: how much of an adapter is enough."""

from pathlib import Path
from typing import Literal

import click

from loralab.cli.common import app, common, console_for


@app.command()
@click.argument("source", metavar="RUN|ADAPTER")
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
@click.option("--output", type=click.Path(path_type=Path), help="A new folder for the results.")
@common
def rank(
    source: str,
    overrides: tuple[str, ...],
    data: str | None,
    base: str | None,
    tolerance: float,
    rule: Literal["uniform", "global"],
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Which rank is enough? Truncates one adapter to every rank and measures what is lost.

    \b
    Examples:
      loralab rank runs/rank-64 --output smaller
      loralab rank my-adapter --base smollm2 --data held-out.csv --tolerance 0.02
    """
    from loralab.runs.rank import rank as choose_rank
    from loralab.runs.tables import rank_table

    console = console_for(as_json, quiet)
    document = choose_rank(
        source,
        data=data,
        base=base,
        overrides=overrides,
        tolerance=tolerance,
        rule=rule,
        output=output,
        listen=console.listen,
    )
    if as_json:
        console.data(document)
        return
    console.table(*rank_table(document))
    console.text(f"\n{document['verdict']}")
    if output is not None:
        console.text(str(output))
