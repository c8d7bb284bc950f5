"""The only place that prints: data to stdout, talk to stderr."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as RichProgress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from loralab.errors import LoralabError
from loralab.events import Note, Phase, Progress

PLAIN_LINE_SECONDS = 15.0
PLAIN_WIDTH = 200  # of tables that go to a file or a pipe


class Console:
    """Where a verb's output goes.

    `as_json`: stdout carries exactly one JSON document. `quiet`: no talk but warnings and errors.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        wide = None if sys.stdout.isatty() else PLAIN_WIDTH
        self._out = RichConsole(highlight=False, soft_wrap=True, width=wide)
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self._progress: RichProgress | None = None
        self._task: TaskID | None = None
        self._phase: Phase | None = None
        self._last_plain = 0.0
        _hear_warnings(self)

    # data -------------------------------------------------------------------------------------

    def data(self, value: Any) -> None:
        """Print a JSON document."""
        self.close()
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def text(self, text: str) -> None:
        """Print plain text to stdout, exactly."""
        self.close()
        sys.stdout.write(text if text.endswith("\n") else text + "\n")

    def line(self, text: str) -> None:
        """Print one line to stdout and hand it over at once: the program goes on running."""
        self.text(text)
        sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Print a table to stdout; the first column is left-aligned, the others right."""
        self.close()
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._out.print(table)

    # talk -------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """One line of talk."""
        if not self.quiet:
            self._err.print(escape(text))

    def warn(self, text: str) -> None:
        """A warning, shown even when quiet."""
        self._err.print(f"[yellow]warning:[/] {escape(text)}")

    def error(self, error: LoralabError) -> None:
        """An error of ours: cause and next step, no traceback."""
        self.close()
        if self.as_json:
            self.data({"error": error_document(error)})
        self._err.print(f"[bold red]error:[/] {escape(error.cause)}")
        self._err.print(f"  [bold]next:[/] {escape(error.next_step)}")

    def usage_error(self, text: str) -> None:
        """A command line that cannot be understood."""
        self._err.print(f"[bold red]error:[/] {escape(text)}")

    # progress ---------------------------------------------------------------------------------

    def listen(self, event: Any) -> None:
        """The listener handed to the runs: shows notes, phases and their progress."""
        match event:
            case Note(text=text, warning=True):
                self.warn(text)
            case Note(text=text):
                self.say(text)
            case Phase():
                self._begin(event)
            case Progress():
                self._advance(event)

    def close(self) -> None:
        """End the progress bar, if one is shown."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _begin(self, phase: Phase) -> None:
        self._phase = phase
        self._last_plain = time.monotonic()
        if self.quiet:
            return
        if not self._err.is_terminal:
            self._err.print(escape(phase.title))
            return
        if self._progress is None:
            self._progress = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=self._err,
                transient=True,
            )
            self._progress.start()
        if self._task is not None and self._task in self._progress.task_ids:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(escape(phase.title), total=phase.total, detail="")

    def _advance(self, event: Progress) -> None:
        if self.quiet or self._phase is None:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=event.done, detail=escape(event.detail))
        elif time.monotonic() - self._last_plain >= PLAIN_LINE_SECONDS:
            self._last_plain = time.monotonic()
            total = "" if self._phase.total is None else f"/{self._phase.total}"
            line = f"  {event.done}{total} {self._phase.unit} {event.detail}"
            self._err.print(escape(line))


def error_document(error: LoralabError) -> dict[str, str]:
    """An error as data, for `--json`."""
    return {
        "kind": type(error).__name__,
        "cause": error.cause,
        "next_step": error.next_step,
    }


def _hear_warnings(console: Console) -> None:
    """Show what the rooms log under "loralab" as talk."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (console.warn if record.levelno >= logging.WARNING else console.say)(
                record.getMessage()
            )

    logger = logging.getLogger("loralab")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
