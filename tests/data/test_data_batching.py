"""Laws of batches: every row once, little padding, a pure function of seed and epoch."""

import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer

from loralab.catalogue import fetch
from loralab.config import DataSection
from loralab.data import (
    Encoded,
    collate,
    epoch_batches,
    evaluation_batches,
    load_dataset,
    order_hash,
    padding_waste,
)

LENGTHS = st.lists(st.integers(1, 300), max_size=200)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_every_row_is_in_one_batch_and_all_but_one_batch_are_full(lengths, size, seed, epoch):
    for batches in (
        epoch_batches(lengths, size, seed=seed, epoch=epoch),
        evaluation_batches(lengths, size),
    ):
        rows = sorted(itertools.chain.from_iterable(batches))
        assert rows == list(range(len(lengths)))
        assert sum(len(batch) < size for batch in batches) <= 1
        assert all(0 < len(batch) <= size for batch in batches)


def test_many_stretches_still_leave_one_part_batch():
    lengths = [1 + i % 97 for i in range(1_003)]
    batches = epoch_batches(lengths, 2, seed=0, epoch=0)
    assert sorted(map(len, batches))[:2] == [1, 2]
    assert padding_waste(batches, lengths) < 0.05


def test_order_depends_on_seed_and_epoch_alone():
    lengths = [1 + i * 7 % 50 for i in range(300)]
    orders = {
        (seed, epoch): order_hash(epoch_batches(lengths, 8, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    torch.manual_seed(1)
    assert orders[1, 2] == order_hash(epoch_batches(lengths, 8, seed=1, epoch=2))


def test_the_order_of_today_is_that_of_the_first_release():
    assert epoch_batches([3, 1, 2, 5, 4, 9], 2, seed=0, epoch=0) == [[1, 2], [0, 4], [3, 5]]


def test_neighbours_change_from_epoch_to_epoch():
    lengths = [10 + i % 5 for i in range(320)]
    pairs = [
        {
            frozenset(pair)
            for batch in epoch_batches(lengths, 8, seed=0, epoch=epoch)
            for pair in itertools.combinations(batch, 2)
        }
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 0.3 * len(pairs[0])


def test_batches_do_not_come_in_order_of_length():
    lengths = list(range(1, 401))
    means = [sum(batch) / len(batch) for batch in epoch_batches(lengths, 8, seed=0, epoch=0)]
    rises = sum(a < b for a, b in itertools.pairwise(means))
    assert 0.3 < rises / len(means) < 0.7


def test_evaluation_starts_with_the_longest_rows():
    assert evaluation_batches([5, 9, 1, 7, 3], 2) == [[1], [0, 3], [2, 4]]


@pytest.mark.parametrize("name", ["movie-reviews", "product-reviews", "tweets", "editorials"])
def test_little_padding_on_real_texts(name):
    data = DataSection(name=name, train_rows=2_000)
    texts = [e.text for e in load_dataset(data, task="classification", num_labels=2).train]
    tokenizer = Tokenizer.from_file(str(fetch("minilm") / "tokenizer.json"))
    tokenizer.no_padding()
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    assert padding_waste([list(range(i, i + 16)) for i in range(0, 1900, 16)], lengths) > 0.3
    assert padding_waste(epoch_batches(lengths, 16, seed=0, epoch=0), lengths) < 0.05
    assert padding_waste(evaluation_batches(lengths, 16), lengths) < 0.05


def test_collate_pads_right():
    rows = [Encoded("a", "a", (5, 6, 7), label=1), Encoded("b", "b", (8,), label=0)]
    batch = collate(rows, pad_id=9, row_indices=[4, 2])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [1, 0]
    assert (batch.ids, batch.row_indices) == (("a", "b"), (4, 2))


def test_collate_never_counts_padding():
    # the padding token is a token that counts elsewhere, as in models where pad is end-of-text
    rows = [Encoded("a", "a", (5, 9), targets=(-100, 9)), Encoded("b", "b", (9,), targets=(9,))]
    batch = collate(rows, pad_id=9)
    assert batch.labels.tolist() == [[-100, 9], [9, -100]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]


@given(LENGTHS.filter(len), st.integers(1, 9))
def test_padding_waste_is_the_share_of_zeros_in_the_masks(lengths, size):
    batches = evaluation_batches(lengths, size)
    rows = [Encoded(str(i), str(i), (1,) * n, label=0) for i, n in enumerate(lengths)]
    masks = [collate([rows[i] for i in b], pad_id=0).attention_mask for b in batches]
    zeros = sum(int((mask == 0).sum()) for mask in masks)
    assert padding_waste(batches, lengths) == pytest.approx(zeros / sum(m.numel() for m in masks))
