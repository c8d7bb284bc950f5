"""What all verbs share: the group, common options, settings, the console."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from loralab import __version__
from loralab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from loralab.console import Console

RECIPE_HELP = """
RECIPE is a TOML file or the name of a shipped recipe (demo, smollm2-reviews,
llama-3.2-1b-imdb, digits-styles). Any setting is overridden by section.key=value.
"""


ORDER = (
    "init",
    "fetch",
    "train",
    "evaluate",
    "generate",
    "compare",
    "doctor",
    "merge",
    "combine",
    "export",
    "serve",
    "probe",
    "plan",
    "rank",
    "inspect",
    "lint",
    "explain",
)
"""The verbs in the order of a first use."""


class Verbs(click.Group):
    """The verbs in `ORDER`; an unknown one gets the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise click.UsageError(f"no verb {name!r}; {nearest(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


@contextmanager
def large_imports() -> Iterator[None]:
    """Inside, torch and what stands on it are imported without rounds of the garbage collector.

    It would look through a million new objects again and again, a third of the time; nor will it
    later, or when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --quiet, on every verb."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
    )(function)
    return click.option("--quiet", is_flag=True, help="No talk on stderr but warnings.")(function)


def recipe_and_overrides(function: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE and overrides, with the few real flags."""
    function = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")(function)
    function = click.argument("recipe", required=False)(function)
    return click.option("--model", help="Short for model.name=...")(function)


def settings_of(recipe: str | None, overrides: tuple[str, ...], model: str | None) -> Any:
    from loralab.config import load_config

    if recipe is None:
        raise ConfigError(
            "no recipe given",
            "name one (`loralab train demo`), or write your own with `loralab init`.",
        )
    named = () if model is None else (f'model.name="{model}"',)
    return load_config(recipe, (*overrides, *named))


def plan_settings(recipe: str | None, overrides: tuple[str, ...], model: str | None) -> Any:
    from loralab.config import config_without_rows

    if recipe is not None:
        return settings_of(recipe, overrides, model)
    if model is None:
        raise ConfigError(
            "no recipe and no model given",
            "name a recipe (`loralab plan demo`), or a model (`--model llama-3.2-1b`).",
        )
    return config_without_rows((f'model.name="{model}"', *overrides))


def console_for(as_json: bool, quiet: bool = False) -> "Console":
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
