"""The catalogue's human-rated texts -> labelled examples."""

import html
from dataclasses import dataclass
from pathlib import Path

from loralab.config import Task
from loralab.data.examples import Example
from loralab.errors import DataError

RATED_LABELS = ("negative", "positive")


@dataclass(frozen=True)
class RatedText:
    """One line of a rated set: `group` is its document, itself where the id names none."""

    id: str
    group: str
    rating: float
    text: str


def read_rated(path: Path) -> list[RatedText]:
    """Lines of `id <tab> mean rating <tab> text`, in UTF-8 with HTML entities.

    Raises `DataError` with the line that is not of this form.
    """
    rated: list[RatedText] = []
    for number, line in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), start=1):
        try:
            id, rating, text = line.split("\t")
            value = float(rating)
        except ValueError:
            raise DataError(
                f"{path}, line {number}: not an id, a rating and a text", "fetch the data again."
            ) from None
        document, underscore, _ = id.rpartition("_")
        rated.append(RatedText(id, document if underscore else id, value, html.unescape(text)))
    return rated


def as_example(rated: RatedText, task: Task, min_rating: float) -> Example | None:
    """The example of a rated text; None where its rating is too near to zero to have a sign.

    For causal language modelling the rating does not matter, so every text stays.
    """
    if task == "causal":
        return Example(rated.id, rated.group, text=rated.text)
    if rated.rating == 0 or abs(rated.rating) < min_rating:
        return None
    return Example(rated.id, rated.group, text=rated.text, label=int(rated.rating > 0))
