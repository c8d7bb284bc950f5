"""merge and combine: adapters made into something else."""

from pathlib import Path

import click

from loralab.cli.common import (
    app,
    common,
    console_for,
)


@app.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--base", help="The base's folder, where SOURCE is an adapter and no run.")
@click.option("--limit", type=click.FloatRange(0, 1), help="Share of the effect that may be lost.")
@click.option("--force", is_flag=True, help="Merge even above the limit.")
@click.option("--measure", is_flag=True, help="Load --base whole, to measure on stored probes.")
@common
def merge(
    source: Path,
    output: Path,
    base: str | None,
    limit: float | None,
    force: bool,
    measure: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Put an adapter into plain weights, with a certificate of what it cost.

    \b
    Examples:
      loralab merge runs/rank-8 --output merged
      loralab merge my-adapter --base llama-folder --output merged
    """
    from loralab.runs.merge import merge as merge_source
    from loralab.runs.tables import certificate_table

    console = console_for(as_json, quiet)
    certificate = merge_source(
        source,
        output,
        base=base,
        limit=limit,
        force=force,
        measure=measure,
        listen=console.listen,
    )
    if as_json:
        console.data({"model": str(output), **certificate})
    else:
        console.table(*certificate_table(certificate))
        console.text(str(output))


@app.command()
@click.argument("sources", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--method", default="linear", show_default=True, help="linear, ties, dare, knots ...")
@click.option("--rank", type=click.IntRange(min=1), help="Cut to this rank, optimally.")
@click.option("--energy", type=click.FloatRange(0, 1), help="Cut to this share of energy.")
@click.option("--density", type=click.FloatRange(0, 1), help="For ties, dare and knots.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@common
def combine(
    sources: tuple[str, ...],
    output: Path,
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add, subtract or mix adapters into one; the deltas are summed, never the factors.

    \b
    Examples:
      loralab combine runs/a=0.7 runs/b=0.3 --output mixed
      loralab combine runs/a=1 runs/b=-1 --rank 8 --output difference
    """
    from loralab.runs.combine import combine as combine_adapters, parse_weights

    console = console_for(as_json, quiet)
    found = combine_adapters(
        parse_weights(sources),
        output,
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        seed=seed,
        listen=console.listen,
    )
    if as_json:
        console.data(found)
    else:
        console.text(f"{output}  (largest error of a module: {found['largest_error']:.2g})")
