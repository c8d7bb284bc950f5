"""Tables -> examples: which columns are read, what each row must be, what labels mean."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from loralab.config import DataSection, Task
from loralab.data.examples import Example, Message
from loralab.data.reading import Table
from loralab.errors import DataError, nearest

Shape = Literal["labelled", "text", "completion", "messages"]
_SHOWN = 3
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


class Faults:
    """Collects what is wrong with the rows, to say it all at once."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: str = "") -> None:
        """One more place where `what` is wrong."""
        self._places.setdefault(what, []).append(place)

    def raise_if_any(self) -> None:
        """Raises `DataError` with every kind of fault and the first places of each."""
        if not self._places:
            return
        lines = [_listed(what, places) for what, places in self._places.items()]
        count = f"{len(lines)} faults:\n" if len(lines) > 1 else ""
        raise DataError(
            count + "\n".join(lines),
            "mend these rows, or name other columns in [data] "
            "(text, label, prompt, completion, messages, group).",
        )


def _listed(what: str, places: Sequence[str]) -> str:
    named = [place for place in places if place]
    if not named:
        return what
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return f"{what}: {'; '.join(named[:_SHOWN])}{more}"


def shape_of(columns: Iterable[str], data: DataSection, task: Task) -> Shape:
    """What rows with these columns hold. Columns that the settings rename are what is meant."""
    columns, defaults = set(columns), DataSection.model_fields
    if task == "classification":
        return "labelled"
    if data.messages in columns or data.messages != defaults["messages"].default:
        return "messages"
    for name in ("prompt", "completion"):
        if getattr(data, name) in columns or getattr(data, name) != defaults[name].default:
            return "completion"
    return "text"


def build_examples(
    tables: Mapping[str, Table],
    data: DataSection,
    *,
    task: Task,
    num_labels: int,
    label_names: Sequence[str] | None = None,
) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """The tables' rows as examples, under the tables' names, and the names of the labels.

    An example's id is the table's name ("row" where there is one only) and the row's number in it.
    Labels are whole numbers below `num_labels`, or names, which count in sorted order (or in that
    of `label_names`).
    Raises `DataError` that lists missing columns (with the nearest), empty texts and bad labels.
    """
    faults = Faults()
    shapes: dict[str, Shape] = {
        name: shape_of(table.columns, data, task) for name, table in tables.items()
    }
    for name, table in tables.items():
        _check_columns(table, _required(shapes[name], data), faults)
    if len(set(shapes.values())) > 1:
        faults.add(f"the files hold rows of different kinds ({', '.join(sorted(shapes.values()))})")
    faults.raise_if_any()

    labels: dict[str, list[int | None]] = {name: [None] * len(t.rows) for name, t in tables.items()}
    names: tuple[str, ...] = ()
    if task == "classification":
        labels, names = _read_labels(tables, data.label, num_labels, label_names, faults)
    prefix = "row" if len(tables) == 1 else ""
    examples = {
        name: [
            _example(
                table, index, f"{prefix or name}-{table.numbers[index]}", data, shapes[name], faults
            )
            for index in range(len(table.rows))
        ]
        for name, table in tables.items()
    }
    faults.raise_if_any()
    return {
        name: [
            Example(label=label, **fields)
            for fields, label in zip(examples[name], labels[name], strict=True)
        ]
        for name in tables
    }, names


def _required(shape: Shape, data: DataSection) -> list[str]:
    columns = {
        "labelled": [data.text, data.label],
        "text": [data.text],
        "completion": [data.prompt, data.completion],
        "messages": [data.messages],
    }[shape]
    return columns + ([data.group] if data.group else [])


def _check_columns(table: Table, required: Iterable[str], faults: Faults) -> None:
    for column in required:
        if column not in table.columns:
            hint = nearest(column, table.columns)
            faults.add(f"{table.source} has no column {column!r}; {hint}")


def _example(
    table: Table, index: int, id: str, data: DataSection, shape: Shape, faults: Faults
) -> dict[str, Any]:
    row, place = table.rows[index], table.place(index)
    fields: dict[str, Any] = {"id": id, "group": id}
    if data.group and row.get(data.group) not in (None, ""):
        fields["group"] = str(row[data.group])
    if shape in ("labelled", "text"):
        fields["text"] = _text(row.get(data.text), data.text, place, faults)
    elif shape == "completion":
        fields["prompt"] = _text(row.get(data.prompt), data.prompt, place, faults)
        fields["completion"] = _text(row.get(data.completion), data.completion, place, faults)
    else:
        fields["messages"] = _messages(row.get(data.messages), place, faults)
    return fields


def _text(value: object, column: str, place: str, faults: Faults) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        faults.add(f"empty {column!r}", place)
    elif not isinstance(value, str):
        faults.add(f"{column!r} is no text", f"{place} ({type(value).__name__})")
    elif not _is_unicode(value):
        faults.add(f"{column!r} holds half a surrogate pair, which is no character", place)
    else:
        return value
    return ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(value: object, place: str, faults: Faults) -> tuple[Message, ...]:
    if isinstance(value, str):  # CSV holds lists as JSON
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns):
        faults.add("messages that are no list of {role, content}", place)
        return ()
    # Parquet gives every struct every field: those without a value are not there
    turns = [{key: item for key, item in turn.items() if item is not None} for turn in turns]
    if not _is_unicode(json.dumps(turns, ensure_ascii=False, default=str)):
        faults.add("messages hold half a surrogate pair, which is no character", place)
    if not any(turn.get("role") == "assistant" and turn.get("content") for turn in turns):
        faults.add("messages without a turn of the assistant, so that nothing counts", place)
    return tuple(turns)


def _read_labels(
    tables: Mapping[str, Table],
    column: str,
    num_labels: int,
    label_names: Sequence[str] | None,
    faults: Faults,
) -> tuple[dict[str, list[int | None]], tuple[str, ...]]:
    raw = {name: [_plain(row.get(column)) for row in t.rows] for name, t in tables.items()}
    for name, table in tables.items():
        for index, value in enumerate(raw[name]):
            if value is None:
                faults.add(f"empty {column!r}", table.place(index))
    values = {value for column_values in raw.values() for value in column_values}
    words = {value for value in values if isinstance(value, str)}
    if words and any(isinstance(value, int) for value in values):
        shown = ", ".join(sorted(map(repr, words))[:_SHOWN])
        faults.add(f"labels are whole numbers in some rows and words in others ({shown})")
        return {name: [None] * len(t.rows) for name, t in tables.items()}, ()
    if words:
        return _named_labels(tables, raw, words, num_labels, label_names, faults)
    names = label_names or next((t.label_names.get(column, ()) for t in tables.values()), ())
    if len(names) != num_labels:
        names = [str(label) for label in range(num_labels)]
    for name, table in tables.items():
        for index, value in enumerate(raw[name]):
            if isinstance(value, int) and not 0 <= value < num_labels:
                faults.add(
                    f"labels outside 0 to {num_labels - 1} (model.num_labels is {num_labels})",
                    f"{table.place(index)} ({value})",
                )
    numbers = {name: [v if isinstance(v, int) else None for v in raw[name]] for name in raw}
    return numbers, tuple(names)


def _named_labels(
    tables: Mapping[str, Table],
    raw: Mapping[str, Sequence[int | str | None]],
    words: set[str],
    num_labels: int,
    label_names: Sequence[str] | None,
    faults: Faults,
) -> tuple[dict[str, list[int | None]], tuple[str, ...]]:
    names = tuple(label_names or sorted(words))
    number_of: dict[int | str | None, int] = {name: index for index, name in enumerate(names)}
    if len(names) != num_labels:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        faults.add(f"labels have {len(names)} names ({shown}), model.num_labels is {num_labels}")
    for name, table in tables.items():
        for index, value in enumerate(raw[name]):
            if isinstance(value, str) and value not in number_of:
                faults.add(
                    f"labels that are none of {', '.join(names)}",
                    f"{table.place(index)} ({value!r})",
                )
    return {name: [number_of.get(value) for value in raw[name]] for name in raw}, names


def _plain(value: object) -> int | str | None:
    """A label as a whole number where it is one in any spelling, else as a word."""
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = "" if value is None else str(value).strip()
    if _WHOLE_NUMBER.fullmatch(text):
        return int(float(text))
    return text or None
