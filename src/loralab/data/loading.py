"""`load_dataset`: settings -> three splits that share no text, with the facts about them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.catalogue import ENTRIES, fetch
from loralab.config import DataSection, Task
from loralab.data.examples import Dataset, Example
from loralab.data.facts import num_repeated, split_facts
from loralab.data.hub import SPLIT_NAMES, read_hub
from loralab.data.rated import RATED_LABELS, as_example, read_rated
from loralab.data.reading import READERS, Table, read_table
from loralab.data.rows import build_examples
from loralab.data.splitting import SHARES, SPLITS, cap, remove_leaks, split_by_hash
from loralab.errors import ConfigError, DataError, nearest

_COLUMNS = ("text", "label", "prompt", "completion", "messages", "group")

logger = logging.getLogger("loralab")


def load_dataset(data: DataSection, *, task: Task, num_labels: int) -> Dataset:
    """The data set that the settings name, split and capped, each row checked.

    `data.name` is a catalogue name, a local file or folder, or a hub id. Splits that the source
    does not have are taken from those it has, by hash of the text or document. Rows of a given
    train or validation split whose text or document is in a later split too are left out.
    Raises `DataError` for rows that cannot be used, `FetchError` for what cannot be brought here,
    `ConfigError` for settings that the source has no use for.
    """
    if data.name is not None and data.name in ENTRIES:
        return _load_rated(data, data.name, task, num_labels)
    _refuse_changed(data, ("min_rating",), f"{data.name or data.train} holds no ratings")
    name, tables = _find_tables(data)
    parts, label_names = build_examples(tables, data, task=task, num_labels=num_labels)
    facts: dict[str, Any] = {
        "source": {split: table.source for split, table in tables.items()},
        "left_out": [],
    }
    given = {split: parts[split] for split in SPLITS if split in parts}
    clean = _without_leaks(given, facts["left_out"])
    complete, facts["split_rule"] = _fill_missing(clean)
    return _finish(name, complete, label_names, data, facts)


def load_rows(
    path: str | Path,
    data: DataSection,
    *,
    task: Task,
    num_labels: int,
    label_names: Sequence[str] | None = None,
) -> tuple[Example, ...]:
    """All rows of one file, for instance to evaluate on; columns as in `data`.

    `label_names` are those of the training data, so that names of labels get the same numbers.
    Raises as `load_dataset` does; rows of one class only are allowed.
    """
    parts, _ = build_examples(
        {"row": read_table(Path(path))},
        data,
        task=task,
        num_labels=num_labels,
        label_names=label_names,
    )
    return tuple(parts["row"])


def _load_rated(data: DataSection, name: str, task: Task, num_labels: int) -> Dataset:
    entry = ENTRIES[name]
    if entry.kind != "data":
        raise DataError(
            f"{name!r} is a model of the catalogue, no data set",
            "give one of " + ", ".join(e.name for e in ENTRIES.values() if e.kind == "data") + ".",
        )
    _refuse_changed(data, (*SPLITS, *_COLUMNS), f"{name} has splits and columns of its own")
    if task == "classification" and num_labels != len(RATED_LABELS):
        raise DataError(
            f"{name} has 2 labels ({', '.join(RATED_LABELS)}), model.num_labels is {num_labels}",
            "set model.num_labels=2.",
        )
    rated = read_rated(fetch(name) / entry.main)
    # Split before rows are left out, so that min_rating moves no row to another side.
    sides = split_by_hash([Example(r.id, r.group, text=r.text) for r in rated])
    kept = {r.id: as_example(r, task, data.min_rating) for r in rated}
    parts: dict[str, list[Example]] = {
        split: [e for side in sides[split] if (e := kept[side.id]) is not None] for split in SPLITS
    }
    num_left_out = sum(example is None for example in kept.values())
    reason = f"no clear sign: |mean rating| below {data.min_rating:g}, or zero"
    facts: dict[str, Any] = {
        "source": f"{entry.package} {entry.version}, {entry.main}; {entry.origin}",
        "licence": entry.licence,
        "left_out": [{"reason": reason, "rows": num_left_out}] if num_left_out else [],
        "split_rule": _rule(SPLITS),
    }
    return _finish(name, parts, RATED_LABELS if task == "classification" else (), data, facts)


def _refuse_changed(data: DataSection, keys: Sequence[str], why: str) -> None:
    defaults = DataSection.model_fields
    changed = [f"data.{key}" for key in keys if getattr(data, key) != defaults[key].default]
    if changed:
        raise ConfigError(f"{why}; set in vain: {', '.join(changed)}", "leave these settings out.")


def _find_tables(data: DataSection) -> tuple[str, dict[str, Table]]:
    given: dict[str, str | None] = {
        "train": data.train,
        "validation": data.validation,
        "test": data.test,
    }
    if data.name is None:
        paths = {split: Path(path) for split, path in given.items() if path is not None}
        return str(data.train), {split: read_table(path) for split, path in paths.items()}
    place = Path(data.name).expanduser()
    if place.is_dir():
        return data.name, _read_folder(place, given)
    if place.is_file() or place.suffix.lower() in READERS:
        if data.train is not None:
            raise ConfigError(
                f"data.name is the file {data.name}, and data.train names another",
                "leave one of them out.",
            )
        others = {split: Path(path) for split, path in given.items() if path is not None}
        return data.name, {s: read_table(path) for s, path in {"train": place, **others}.items()}
    if place.is_absolute() or data.name.startswith(("./", "../", "~")):
        raise DataError(f"no folder or file {data.name!r}", "check data.name.")
    if "/" not in data.name and (close := nearest(data.name, ENTRIES)).startswith("did you mean"):
        raise DataError(f"no data set {data.name!r}; {close}", "mend data.name.")
    tables = read_hub(data.name, given)
    if "train" not in tables:
        raise DataError(f"{data.name} has no train split", "name one of its splits in data.train.")
    return data.name, tables


def _read_folder(folder: Path, given: Mapping[str, str | None]) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for split in SPLITS:
        named = given[split]
        paths = [folder / named] if named is not None else _split_files(folder, split)
        if paths:
            tables[split] = _joined([read_table(path) for path in paths])
    if "train" not in tables:
        raise DataError(
            f"{folder} holds no file for train",
            "name a file train.csv, train.jsonl or train.parquet, or set data.train.",
        )
    return tables


def _split_files(folder: Path, split: str) -> list[Path]:
    """`train.csv`, or shards such as `train-00000-of-00002.parquet`; also under `data/`."""
    for place in (folder, folder / "data"):
        for word in SPLIT_NAMES[split]:
            files = [path for path in place.glob(f"{word}*") if path.suffix.lower() in READERS]
            whole = [path for path in files if path.stem == word]
            shards = sorted(path for path in files if path.stem.startswith(f"{word}-"))
            if len(whole) > 1:
                raise DataError(
                    f"{place} holds {word} more than once: "
                    + ", ".join(sorted(path.name for path in whole)),
                    f"name the one that is meant in data.{split}.",
                )
            if whole or shards:
                return whole or shards
    return []


def _joined(tables: Sequence[Table]) -> Table:
    if len(tables) == 1:
        return tables[0]
    rows = [row for table in tables for row in table.rows]
    columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
    source = f"{tables[0].source} and {len(tables) - 1} more"
    return Table(source, columns, rows, range(1, len(rows) + 1))


def _without_leaks(
    parts: Mapping[str, list[Example]], left_out: list[dict[str, Any]]
) -> Mapping[str, list[Example]]:
    clean = remove_leaks(parts)
    for split, examples in parts.items():
        lost = len(examples) - len(clean[split])
        if lost:
            later = " or ".join(s for s in SPLITS[SPLITS.index(split) + 1 :] if s in parts)
            reason = f"rows of {split} whose text or document is in {later} too"
            left_out.append({"reason": reason, "rows": lost})
            logger.warning("left out %d %s", lost, reason)
    return clean


def _fill_missing(
    parts: Mapping[str, list[Example]],
) -> tuple[dict[str, list[Example]], str]:
    """Takes the splits that are missing from train, by hash."""
    missing = [split for split in SPLITS if split not in parts]
    if not missing:
        return dict(parts), "as given"
    into: list[str] = ["train", *missing]
    own = split_by_hash(parts["train"], into)
    return {split: own[split] if split in own else parts[split] for split in SPLITS}, _rule(into)


def _rule(into: Sequence[str]) -> str:
    total = sum(SHARES[split] for split in into)
    shares = ", ".join(f"{split} {SHARES[split] / total:.1%}" for split in into)
    return f"by SHA-256 of the document, or of the normalised text: {shares}"


def _finish(
    name: str,
    parts: Mapping[str, list[Example]],
    label_names: Sequence[str],
    data: DataSection,
    facts: dict[str, Any],
) -> Dataset:
    capped = {split: tuple(cap(parts[split], getattr(data, f"{split}_rows"))) for split in SPLITS}
    _check_splits(name, capped, label_names, num_rows=sum(map(len, parts.values())))
    facts = {
        "name": name,
        **facts,
        "splits": {s: split_facts(capped[s], len(parts[s]), label_names) for s in SPLITS},
        "repeated_rows": num_repeated(capped),
        "label_names": list(label_names),
    }
    return Dataset(name, **capped, label_names=tuple(label_names), facts=facts)


def _check_splits(
    name: str,
    parts: Mapping[str, Sequence[Example]],
    label_names: Sequence[str],
    num_rows: int,
) -> None:
    empty = [split for split in SPLITS if not parts[split]]
    if empty:
        raise DataError(
            f"{name}: no rows for {' and '.join(empty)} ({num_rows} rows in all)",
            "give more rows, or files of their own in data.train, data.validation, data.test.",
        )
    if not label_names:
        return
    for split, examples in parts.items():
        present = {label_names[e.label] for e in examples if e.label is not None}
        if len(present) == 1 and split == "train":
            raise DataError(
                f"{name}: all {len(examples)} rows of train have the label {present.pop()!r}; "
                "there is nothing to learn",
                "give rows of two classes at least.",
            )
        absent = [label for label in label_names if label not in present]
        if absent:
            logger.warning("%s: no row of %s has the label %s", name, split, ", ".join(absent))
