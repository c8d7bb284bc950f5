"""Files of rows: every format gives the same examples, every fault its own words."""

import logging

import pytest

from loralab.config import DataSection
from loralab.data import load_dataset, load_rows
from loralab.errors import ConfigError, DataError

ROWS = [
    {"text": f'line {i}, with "quotes"\nand é, \u2028 and a comma', "label": i % 2}
    for i in range(120)
]


def load(num_labels=2, task="classification", **settings):
    return load_dataset(DataSection(**settings), task=task, num_labels=num_labels)


def every(dataset):
    return [*dataset.train, *dataset.validation, *dataset.test]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(write, suffix):
    dataset = load(train=str(write(f"rows.{suffix}", ROWS)))
    found = {(e.text, e.label) for e in every(dataset)}
    assert found == {(row["text"], row["label"]) for row in ROWS}
    assert dataset.label_names == ("0", "1")
    assert "train 70.0%, validation 10.0%, test 20.0%" in dataset.facts["split_rule"]


def test_equal_contents_give_equal_splits_in_every_format(write):
    texts = [
        [e.text for e in load(train=str(write(f"rows.{suffix}", ROWS))).test]
        for suffix in ("csv", "jsonl", "parquet")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,1\nbad,0\n", "utf-8-sig")
    assert [e.text for e in load_rows(path, DataSection(train="-"), **CLASSES)] == ["good", "bad"]


CLASSES = {"task": "classification", "num_labels": 2}


def test_names_of_labels_count_in_sorted_order(write):
    rows = [{"text": f"text {i}", "label": ["yes", "no", "maybe"][i % 3]} for i in range(90)]
    path = write("rows.jsonl", rows)
    dataset = load(num_labels=3, train=str(path))
    assert dataset.label_names == ("maybe", "no", "yes")
    wanted = {row["text"]: dataset.label_names.index(row["label"]) for row in rows}
    assert {e.text: e.label for e in every(dataset)} == wanted
    counts = [dataset.facts["splits"][s]["classes"] for s in ("train", "validation", "test")]
    assert {name: sum(c[name] for c in counts) for name in wanted and counts[0]} == {
        "maybe": 30,
        "no": 30,
        "yes": 30,
    }
    few = write("few.jsonl", [{"text": "one", "label": "yes"}])
    again = load_rows(
        few,
        DataSection(train="-"),
        task="classification",
        num_labels=3,
        label_names=dataset.label_names,
    )
    assert again[0].label == 2


@pytest.mark.parametrize("labels", [(True, False), ("1", "0"), (1.0, 0.0), ("+1", "0.0")])
def test_whole_numbers_in_any_spelling(write, labels):
    path = write("rows.jsonl", [{"text": str(i), "label": labels[i]} for i in range(2)])
    assert [e.label for e in load_rows(path, DataSection(train="-"), **CLASSES)] == [1, 0]


def test_a_folder_with_files_of_splits(write, tmp_path):
    for name, rows in [("train", ROWS[:80]), ("dev", ROWS[80:90]), ("test", ROWS[90:])]:
        write(f"set/{name}.csv", rows)
    dataset = load(name=str(tmp_path / "set"))
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [80, 10, 30]
    assert dataset.facts["split_rule"] == "as given"
    assert dataset.train[0].id == "train-2"  # the header is line 1


def test_shards_are_joined(write, tmp_path):
    write("set/data/train-00000-of-00002.parquet", ROWS[:60])
    write("set/data/train-00001-of-00002.parquet", ROWS[60:])
    assert len(every(load(name=str(tmp_path / "set")))) == 120


def test_missing_splits_come_from_train(write):
    train, test = write("a.csv", ROWS[:90]), write("b.csv", ROWS[90:])
    dataset = load(train=str(train), test=str(test))
    assert len(dataset.test) == 30
    assert len(dataset.train) + len(dataset.validation) == 90
    assert dataset.facts["split_rule"].endswith("train 87.5%, validation 12.5%")


def test_leaks_are_taken_out_of_train_and_stated(write, caplog):
    train = write("a.csv", [*ROWS[:100], {"text": ROWS[110]["text"].upper(), "label": 1}])
    test = write("b.csv", ROWS[90:])
    with caplog.at_level(logging.WARNING, "loralab"):
        dataset = load(train=str(train), test=str(test))
    assert len(dataset.test) == 30
    assert dataset.facts["left_out"] == [
        {"reason": "rows of train whose text or document is in test too", "rows": 11}
    ]
    assert "left out 11 rows of train" in caplog.text


def test_documents_stay_whole(write):
    rows = [{**row, "doc": f"d{i // 2}"} for i, row in enumerate(ROWS)]
    dataset = load(train=str(write("rows.csv", rows)), group="doc")
    sides = [{e.group for e in side} for side in (dataset.train, dataset.validation, dataset.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 60
    assert dataset.facts["splits"]["test"]["documents"] == len(sides[2])


def test_caps_are_in_the_facts(write):
    path = str(write("rows.csv", ROWS))
    dataset = load(train=path, train_rows=20, test_rows=10)
    facts = dataset.facts["splits"]
    assert (facts["train"]["rows"], facts["test"]["rows"]) == (20, 10)
    assert facts["train"]["available_rows"] == len(load(train=path).train)


def test_equal_rows_have_equal_hashes(write):
    path = str(write("rows.csv", ROWS))
    first, again = load(train=path).facts, load(train=path).facts
    assert first == again
    changed = write("rows.csv", [*ROWS[1:], {"text": "other", "label": 0}])
    assert load(train=str(changed)).facts["splits"] != first["splits"]


# Causal rows


def test_prompts_and_completions_messages_and_texts_are_told_by_their_columns(write):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    kinds = {
        "completion": {"prompt": "a", "completion": "b", "text": "c"},
        "messages": {"messages": talk, "text": "c"},
        "text": {"text": "c"},
    }
    for suffix in ("jsonl", "parquet"):
        for kind, row in kinds.items():
            path = write(f"{kind}.{suffix}", [row])
            (example,) = load_rows(path, DataSection(train="-"), task="causal", num_labels=2)
            assert getattr(example, kind) is not None
            assert (example.text is not None) == (kind == "text")
    assert example.label is None


def test_a_renamed_column_is_what_is_meant(write):
    path = write("rows.jsonl", [{"text": "c", "prompt": "a", "answr": "b"}])
    data = DataSection(train="-", completion="answer")
    with pytest.raises(DataError, match="no column 'answer'; did you mean 'answr'"):
        load_rows(path, data, task="causal", num_labels=2)


# Bad input: (file name, its bytes, what the error says)

BAD = {
    "missing-column": ("a.csv", b"txt,label\nx,1\n", r"no column 'text'; did you mean 'txt'"),
    "label-out-of-range": (
        "a.csv",
        b"text,label\nx,0\ny,5\nz,-1\n",
        r"labels outside 0 to 1 \(model.num_labels is 2\): .*line 3 \(5\); .*line 4 \(-1\)",
    ),
    "three-names": (
        "a.csv",
        b"text,label\nx,a\ny,b\nz,c\n",
        r"3 names \(a, b, c\), model.num_labels is 2",
    ),
    "numbers-and-words": ("a.csv", b"text,label\nx,1\ny,bad\n", r"words in others \('bad'\)"),
    "empty-label": ("a.csv", b"text,label\nx,\ny,1\n", r"empty 'label': .*line 2"),
    "empty-text": ("a.csv", b"text,label\n  ,1\ny,0\n", r"empty 'text': .*a.csv, line 2"),
    "null-text": ("a.jsonl", b'{"text": null, "label": 1}\n', r"empty 'text': .*line 1"),
    "number-text": ("a.jsonl", b'{"text": 3, "label": 1}\n', r"'text' is no text: .*\(int\)"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800", "label": 1}\n', "half a surrogate pair"),
    "not-utf8": ("a.csv", b"text,label\ncaf\xe9,1\n", r"not UTF-8: line 2, byte 15 .* 0xe9"),
    "not-utf8-bom": (
        "a.csv",
        b"\xef\xbb\xbftext,label\ncaf\xe9,1\n",
        r"not UTF-8: line 2, byte 18 .* 0xe9",
    ),
    "empty-file": ("a.csv", b"", "is empty"),
    "header-only": ("a.csv", b"text,label\n", "has no rows"),
    "doubled-header": ("a.csv", b"text,text\nx,y\n", "occur twice"),
    "short-row": ("a.csv", b"text,label\nx,1\ny\n", "line 3: 1 fields, but the header has 2"),
    "open-quote": ("a.csv", b'text,label\n"x,1\n', "not valid CSV"),
    "broken-json": ("a.jsonl", b'{"text": "x", "label": 1}\n{"text"\n', "line 2: not valid JSON"),
    "json-list": ("a.jsonl", b"[1]\n", "line 1: a JSON list, not an object"),
    "no-parquet": ("a.parquet", b"PAR1 and nothing else", "damaged or no Parquet file"),
    "other-suffix": ("a.xlsx", b"x", "known: .csv, .tsv, .jsonl, .ndjson, .parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_apart(tmp_path, case):
    name, content, words = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load(train=str(path))
    assert caught.value.next_step


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_parquet(write, damage):
    path = write("rows.parquet", ROWS)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[20:80] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged or no Parquet file"):
        load(train=str(path))


def test_all_faults_are_told_at_once(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n,0\nx,7\n")
    (tmp_path / "test.csv").write_text("text,label\n,1\nx,oops\n".replace("oops", "9"))
    with pytest.raises(DataError) as caught:
        load(name=str(tmp_path))
    cause = caught.value.cause
    assert cause.startswith("2 faults:")
    assert "empty 'text'" in cause and "labels outside 0 to 1" in cause
    assert cause.count("train.csv") == 2 and cause.count("test.csv") == 2


def test_one_class_only(write):
    path = write("rows.csv", [{**row, "label": 1} for row in ROWS])
    with pytest.raises(DataError, match=r"all .* rows of train have the label '1'"):
        load(train=str(path))


def test_too_few_rows_to_split(write):
    path = write("rows.csv", ROWS[:2])
    with pytest.raises(DataError, match=r"no rows for .* \(2 rows in all\)"):
        load(train=str(path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": ""}, "empty 'completion'"),
        ({"prompt": "a", "text": "b"}, "no column 'completion'"),
        ({"messages": [{"content": "x"}]}, "no list of {role, content}"),
        ({"messages": [{"role": "user", "content": "x"}]}, "without a turn of the assistant"),
        ({"label": 1}, "no column 'text'"),
    ],
)
def test_bad_causal_rows(write, row, words):
    with pytest.raises(DataError, match=words):
        load(train=str(write("rows.jsonl", [row])), task="causal")


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(DataError, match="no file"):
        load(train=str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="no folder or file"):
        load(name=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file for train"):
        load(name=str(tmp_path / "empty"))


def test_ratings_are_not_expected_of_files(write):
    with pytest.raises(ConfigError, match=r"holds no ratings; set in vain: data\.min_rating"):
        load(train=str(write("rows.csv", ROWS)), min_rating=1.0)
