"""transformers' talk off while loading; loralab says itself what a user must know."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as talk


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load reports inside; everything as it was afterwards.

    What the reports tell (missing, unexpected, mismatched weights) is checked by the loader,
    which raises or warns in loralab's own words.
    """
    verbosity, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(verbosity)
        if bars:
            talk.enable_progress_bar()
