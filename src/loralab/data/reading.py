"""Files of rows -> tables: CSV and TSV, JSONL, Parquet."""

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from loralab.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with named columns, and where each one stands in its source.

    `numbers[i]` is the number of row i's `unit` (line or row) in `source`, counted from 1.
    `label_names[column]` are the names that the source itself gives the numbers of a column.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[Row]
    numbers: Sequence[int]
    unit: str = "row"
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, index: int) -> str:
        """Where row `index` stands, for messages."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"


def read_table(path: Path) -> Table:
    """The rows of one file, its format told by the suffix.

    Raises `DataError` for a file that is missing, empty, of another kind, not UTF-8 (with line and
    byte) or damaged (with the line where there are lines).
    """
    if not path.is_file():
        raise DataError(
            f"no file {str(path)!r}", "check data.train, data.validation and data.test."
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has no suffix that tells its format (known: {', '.join(READERS)})",
            "convert or rename the file.",
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", "give a file with at least one row.")
        table = reader(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", "check the file.") from error
    if not table.rows:
        raise DataError(f"{path} has no rows", "give a file with at least one row.")
    return table


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(sys.maxsize)  # long documents are no fault
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: an open or stray quote is an error with a line, never a swallowed rest of the file
    lines = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    numbers: list[int] = []
    try:
        header = next(lines, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(
                f"{path}: the header {header} has names that are empty or occur twice",
                "give every column a name of its own in the first line.",
            )
        start = lines.line_num + 1
        for values in lines:
            if values:
                _check_width(path, start, values, header)
                rows.append(dict(zip(header, values, strict=True)))
                numbers.append(start)
            start = lines.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {lines.line_num}: not valid CSV ({error})",
            "mend the quotes of that line: a field with quotes is quoted, its quotes doubled.",
        ) from None
    return Table(str(path), tuple(header), rows, numbers, "line")


def _check_width(path: Path, line: int, values: list[str], header: list[str]) -> None:
    if len(values) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(values)} fields, but the header has {len(header)} "
            f"({', '.join(header)})",
            "quote fields that hold the separator or line ends.",
        )


def _read_jsonl(path: Path) -> Table:
    rows: list[Row] = []
    numbers: list[int] = []
    columns: dict[str, None] = {}
    # str.splitlines would also split at U+2028 and others, which JSON strings may hold
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({error})",
                "write one JSON object a line.",
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: a JSON {type(row).__name__}, not an object",
                'write one JSON object a line, such as {"text": "...", "label": 0}.',
            )
        columns.update(dict.fromkeys(row))
        rows.append(row)
        numbers.append(number)
    return Table(str(path), tuple(columns), rows, numbers, "line")


def _read_parquet(path: Path) -> Table:
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is damaged or no Parquet file: {reason}",
            "copy or write the file again; it may be cut short.",
        ) from None
    return Table(str(path), tuple(table.column_names), rows, range(1, len(rows) + 1))


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # with a byte order mark, positions count from behind it
        start = error.start + (len(data) - len(error.object))
        line = data.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path} is not UTF-8: line {line}, byte {start + 1} of the file is "
            f"0x{data[start]:02x}",
            "save the file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8`.",
        ) from None


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
