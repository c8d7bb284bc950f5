"""The command line: parse, call, print. Heavy imports happen inside the verbs."""

import os
import sys

import click

from loralab.cli import (
    adapters,
    choosing,
    exporting,
    foreseeing,
    serving,
    starting,
    training,
    understanding,
)
from loralab.cli.common import app, console_for
from loralab.errors import LoralabError

VERB_FILES = (
    adapters,
    choosing,
    exporting,
    foreseeing,
    serving,
    starting,
    training,
    understanding,
)
"""Importing a file enters its verbs into `app`."""

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # measuring a step's memory makes torch warn of every tensor that is older than it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    as_json = "--json" in (arguments if arguments is not None else sys.argv[1:])
    try:
        app.main(args=arguments, prog_name="loralab", standalone_mode=False)
    except LoralabError as error:
        console_for(as_json).error(error)
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        console_for(as_json).usage_error(error.format_message() + hint)
        return 2
    except (click.Abort, KeyboardInterrupt):
        console_for(as_json).usage_error("interrupted before there was anything to save")
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
