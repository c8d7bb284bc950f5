"""Hub ids, with a stand-in for the package `datasets` that is no dependency."""

import sys
from types import SimpleNamespace

import pytest

from loralab.config import DataSection
from loralab.data import load_dataset
from loralab.errors import DataError, FetchError


class Rows:
    """What this room uses of `datasets.Dataset`."""

    def __init__(self, rows, names):
        self.rows = rows
        self.column_names = list(rows[0])
        self.features = {"text": SimpleNamespace(), "label": SimpleNamespace(names=names)}

    def to_list(self):
        return self.rows


@pytest.fixture
def hub(monkeypatch):
    seen = []

    def load_dataset(id, configuration):
        seen.append((id, configuration))
        if id == "owner/absent":
            raise ConnectionError("no route to the hub\nand more")
        parts = {}
        for split, size in [("train", 60), ("unsupervised", 5), ("test", 20)]:
            rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(size)]
            parts[split] = Rows(rows, ["neg", "pos"])
        return parts

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return seen


def load(**settings):
    return load_dataset(DataSection(**settings), task="classification", num_labels=2)


def test_splits_and_names_of_labels_come_from_the_hub(hub):
    dataset = load(name="owner/set:plain")
    assert hub == [("owner/set", "plain")]
    assert (len(dataset.test), len(dataset.train) + len(dataset.validation)) == (20, 60)
    assert dataset.label_names == ("neg", "pos")


def test_a_split_that_is_not_there(hub):
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        load(name="owner/set", test="tset")


def test_a_hub_that_is_not_reached(hub):
    with pytest.raises(FetchError, match=r"could not load 'owner/absent' from the hub: no route"):
        load(name="owner/absent")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FetchError, match="needs the package `datasets`") as caught:
        load(name="owner/set")
    assert "loralab[hub]" in caught.value.next_step
