"""What happens while a verb works, told to whoever listens (the console, a notebook, a test)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Note:
    """One sentence for the reader: a choice that was made, a thing that is worth knowing.

    `topic` is a short key for a listener that leaves some out ("learning-rate").
    """

    text: str
    warning: bool = False
    topic: str = ""


@dataclass(frozen=True)
class Phase:
    """A stretch of work begins: `total` units of `unit` (None where the number is unknown)."""

    title: str
    total: int | None = None
    unit: str = "steps"


@dataclass(frozen=True)
class Progress:
    """`done` units of the current phase are finished; `detail` is a short reading."""

    done: int
    detail: str = ""


Listener = Callable[[Any], None]


def ignore(_event: Any) -> None:
    """The listener that does not listen."""
