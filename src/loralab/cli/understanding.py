"""inspect, lint and explain: what an adapter is, and what a run proves."""

from pathlib import Path

import click

from loralab.cli.common import (
    app,
    common,
    console_for,
)


@app.command()
@click.argument("source", metavar="ADAPTER|RUN|CHECKPOINT")
@click.option("--base", help="The base model: compares the change with its weights.")
@click.option("--against", multiple=True, help="Another adapter; may be given several times.")
@click.option("--data", help="Rows to measure the dimension of activations on, before and after.")
@click.option("--extract", type=click.IntRange(min=1), help="Make an adapter of this rank.")
@click.option("--output", type=click.Path(path_type=Path), help="The report, or the new adapter.")
@click.option("--no-intruders", is_flag=True, help="Leave out what needs the base's SVD.")
@common
def inspect(
    source: str,
    base: str | None,
    against: tuple[str, ...],
    data: str | None,
    extract: int | None,
    output: Path | None,
    no_intruders: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """X-ray an adapter: what its rank is used for, what it does to its base, what it shares.

    Of a whole checkpoint, looks at the difference to its base; with --extract it writes the best
    adapter of that rank to the folder --output and says how much of the change that keeps.

    \b
    Examples:
      loralab inspect runs/rank-8 --output xray.html
      loralab inspect my-adapter --base smollm2 --against other-adapter
      loralab inspect runs/rank-8 --base minilm --data tweets
      loralab inspect tuned-model --base smollm2 --extract 16 --output extracted
    """
    from loralab.runs.inspect import inspect as look_into
    from loralab.runs.tables import xray_table

    console = console_for(as_json, quiet)
    document = look_into(
        source,
        base=base,
        against=against,
        data=data,
        extract=extract,
        output=output,
        directions=not no_intruders,
        listen=console.listen,
    )
    if as_json:
        console.data(document)
        return
    console.text("\n".join(document["summary"]) + "\n")
    console.table(*xray_table(document))
    if "report" in document:
        console.text(f"\n{document['report']}")


@app.command()
@click.argument("sources", nargs=-1, required=True, metavar="RUN...|COMPARISON|RECIPE")
@common
def lint(sources: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Would this conclusion survive? Checks how the arms of an experiment were compared.

    Takes run folders, a comparison's folder, a recipe, or the description (TOML) of an experiment
    that was run elsewhere; docs/linting.md lists the rules and the description's keys.
    Exits with 1 where there is a finding of level error: the conclusion does not follow.

    \b
    Examples:
      loralab lint demo
      loralab lint runs/demo
      loralab lint runs/rank-8 runs/rank-16
      loralab lint llama-imdb-two-arms
    """
    from loralab.runs.lint import finding_lines, lint_sources

    console = console_for(as_json, quiet)
    document = lint_sources(sources)
    if as_json:
        console.data(document)
    else:
        console.text(finding_lines(document))
    if document["counts"]["error"]:
        raise SystemExit(1)


@app.command()
@click.argument("source", required=False, metavar="[ADAPTER|RUN]")
@click.option(
    "--output", type=click.Path(path_type=Path), default="explain.html", show_default=True
)
@common
def explain(source: str | None, output: Path, as_json: bool, quiet: bool) -> None:
    """Write a page that teaches low-rank adapters: one HTML file, no network.

    \b
    Examples:
      loralab explain
      loralab explain runs/rank-8 --output lora.html    with your own adapter's spectra
    """
    from loralab.runs.explain import explain as write_page

    console = console_for(as_json, quiet)
    document = write_page(output, source, listen=console.listen)
    if as_json:
        console.data(document)
    else:
        console.text(document["page"])
