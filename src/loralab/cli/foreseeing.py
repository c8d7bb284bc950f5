"""plan and doctor: what would happen, before it costs anything."""

import shlex
from pathlib import Path
from typing import Literal

import click

from loralab.cli.common import (
    RECIPE_HELP,
    app,
    common,
    console_for,
    large_imports,
    plan_settings,
    recipe_and_overrides,
    settings_of,
)


@app.command(epilog=RECIPE_HELP)
@recipe_and_overrides
@click.option("--device", default="auto", show_default=True, help='a10, h100, "16GiB", cpu ...')
@click.option(
    "--step",
    type=click.Choice(["own", "peft"]),
    default="own",
    show_default=True,
    help="Whose training step: loralab's own, or plain PEFT's.",
)
@click.option("--details", is_flag=True, help="Methods, longest rows, largest rank, serving too.")
@click.option("--verify", is_flag=True, help="Run two real steps here, with random weights.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the picture (HTML) there.")
@common
def plan(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    device: str,
    step: Literal["own", "peft"],
    details: bool,
    verify: bool,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Will it fit? The memory of a training step, before anything is loaded.

    RECIPE may be left out with --model: a preset (llama-3.1-8b), a folder or config.json, a
    catalogue name, or a hub id. No weights are needed.

    \b
    Examples:
      loralab plan my.toml --device a10 --output plan.html
      loralab plan --model llama-3.1-70b --device h100 method.rank=16 training.batch_size=1
    """
    console = console_for(as_json, quiet)
    if recipe is not None and "=" in recipe:
        recipe, overrides = None, (recipe, *overrides)
    config = plan_settings(recipe, overrides, model)

    with large_imports():
        from loralab.runs.plan import plan as make_plan
        from loralab.runs.tables import plan_lines, plan_tables

    document = make_plan(
        config,
        device=device,
        step=step,
        details=details,
        check=verify,
        output=output,
        listen=console.listen,
    )
    if as_json:
        console.data(document)
        return
    console.text(plan_lines(document))
    for table in plan_tables(document):
        console.text("")
        console.table(*table)
    if output is not None:
        console.text(f"\n{output}")


@app.command(epilog=RECIPE_HELP)
@recipe_and_overrides
@click.option(
    "--convert",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="No check: settings that start the same training at another rank, scaling, init or alpha.",
)
@common
def doctor(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    changes: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a recipe on the real model and data, up to the second training step.

    \b
    Examples:
      loralab doctor my.toml training.learning_rate=2e-5
      loralab doctor my.toml --convert rank=64 --convert 'scaling=alpha/sqrt(rank)'
    """
    console = console_for(as_json, quiet)
    config = settings_of(recipe, overrides, model)
    if changes:
        from loralab.runs.convert import convert, parse_changes
        from loralab.runs.tables import conversion_table

        conversion = convert(config, parse_changes(changes))
        if as_json:
            console.data(conversion.to_dict())
            return
        console.table(*conversion_table(conversion.to_dict()))
        console.text("\n" + shlex.join(conversion.arguments()))
        console.text("\n".join(conversion.notes))
        return

    from loralab.runs.doctor import examine
    from loralab.runs.tables import findings_table

    findings = examine(config, listen=console.listen)
    if as_json:
        console.data(findings)
    else:
        console.table(*findings_table(findings))
    if any(finding["level"] == "error" for finding in findings):
        raise SystemExit(1)
