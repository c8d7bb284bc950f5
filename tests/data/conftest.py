"""Small tokenizers, and a writer of files of rows."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import build_tokenizer
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def bert_like():
    return build_tokenizer("[CLS] $A [SEP]", pad_token="[PAD]", sep_token="[SEP]")


@pytest.fixture(scope="session")
def causal_with_start():
    """Puts a start token before every text, and (as few do) a separator behind it."""
    return build_tokenizer("<s> $A [SEP]", bos_token="<s>", eos_token="<|end|>")


@pytest.fixture
def causal():
    """Of the test's own, as tests put chat templates into it."""
    return build_tokenizer(eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def write(tmp_path):
    """Writes rows (a list of dicts) to a file of the kind its name ends with."""

    def write_rows(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".csv", ".tsv"):
            with path.open("w", newline="", encoding="utf-8") as stream:
                delimiter = "\t" if path.suffix == ".tsv" else ","
                writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write_rows
