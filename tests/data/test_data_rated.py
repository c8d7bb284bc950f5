"""The catalogue's rated texts: the counts of their source, and splits that are fixed for ever."""

import functools

import pytest

from loralab.catalogue import ENTRIES, fetch
from loralab.config import DataSection
from loralab.data import load_dataset
from loralab.data.rated import read_rated
from loralab.data.splitting import hash_share, normalise
from loralab.errors import ConfigError, DataError

ROWS = {
    "movie-reviews": (10_605, 10_072),
    "product-reviews": (3_708, 2_985),
    "tweets": (4_200, 3_432),
    "editorials": (5_190, 2_970),
}
DOCUMENTS = {"product-reviews": 300, "editorials": 498}


@functools.cache
def load(name, **settings):
    return load_dataset(DataSection(name=name, **settings), task="classification", num_labels=2)


def every(dataset):
    return [*dataset.train, *dataset.validation, *dataset.test]


@pytest.mark.parametrize("name", ROWS)
def test_counts_of_the_source(name):
    entry = ENTRIES[name]
    rated = read_rated(fetch(name) / entry.main)
    total, clear = ROWS[name]
    assert len(rated) == total
    dataset = load(name)
    assert len(every(dataset)) == clear
    assert dataset.facts["left_out"] == [
        {"reason": "no clear sign: |mean rating| below 0.5, or zero", "rows": total - clear}
    ]
    if name in DOCUMENTS:
        assert len({text.group for text in rated}) == DOCUMENTS[name]


@pytest.mark.parametrize("name", ROWS)
def test_neither_a_document_nor_a_text_is_on_two_sides(name):
    dataset = load(name)
    sides = [dataset.train, dataset.validation, dataset.test]
    for mark in (lambda e: e.group, lambda e: normalise(e.text)):
        marks = [{mark(example) for example in side} for side in sides]
        assert sum(map(len, marks)) == len(set.union(*marks))


@pytest.mark.parametrize("name", ROWS)
def test_shares_are_about_those_stated(name):
    facts = load(name).facts["splits"]
    total = sum(split["rows"] for split in facts.values())
    assert facts["train"]["rows"] / total == pytest.approx(0.7, abs=0.05)
    assert facts["test"]["rows"] / total == pytest.approx(0.2, abs=0.05)


def test_the_label_is_the_sign_of_the_rating():
    ratings = {t.id: t.rating for t in read_rated(fetch("tweets") / ENTRIES["tweets"].main)}
    dataset = load("tweets", min_rating=1.0)
    assert dataset.label_names == ("negative", "positive")
    assert all(abs(ratings[e.id]) >= 1 for e in every(dataset))
    assert all((ratings[e.id] > 0) == (e.label == 1) for e in every(dataset))


def test_min_rating_moves_no_row_to_another_side():
    loose, strict = load("editorials", min_rating=0.1), load("editorials", min_rating=1.5)
    assert {e.id for e in strict.test} <= {e.id for e in loose.test}
    assert {e.id for e in strict.train} <= {e.id for e in loose.train}


def test_the_rule_is_the_one_in_the_documentation():
    for example in load("movie-reviews").test[:200]:
        assert 0.8 <= hash_share(normalise(example.text)) < 1


def test_splits_of_today_are_those_of_the_first_release():
    facts = load("tweets").facts["splits"]
    assert {split: (f["rows"], f["sha256"][:16]) for split, f in facts.items()} == {
        "train": (2427, "f34f569e57718abb"),
        "validation": (361, "22073a9070acf217"),
        "test": (644, "0f87c7d0f39a4686"),
    }


def test_entities_are_read_as_characters():
    texts = " ".join(example.text for example in every(load("tweets")))
    assert "&amp;" not in texts and "&lt;3" not in texts and "<3" in texts


def test_causal_rows_are_all_texts_without_labels():
    dataset = load_dataset(DataSection(name="tweets"), task="causal", num_labels=2)
    assert len(every(dataset)) == 4_200
    assert dataset.label_names == () and all(e.label is None for e in every(dataset))


def test_settings_without_use_are_refused():
    with pytest.raises(ConfigError, match=r"set in vain: data\.train, data\.text"):
        load("tweets", train="x.csv", text="body")
    with pytest.raises(DataError, match="2 labels"):
        load_dataset(DataSection(name="tweets"), task="classification", num_labels=3)
    with pytest.raises(DataError, match="is a model of the catalogue"):
        load("minilm")
    with pytest.raises(DataError, match="did you mean 'tweets'"):
        load("tweet")
