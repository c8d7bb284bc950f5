"""Batches of rows of like length, in an order that depends on nothing but seed and epoch."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from loralab.data.examples import IGNORED, Batch, Encoded

_STRETCH_BATCHES = 128
_STREAM = 0x6F72646572  # "order": this stream shares nothing with other uses of the same seed


def epoch_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Indices of the rows of each batch of one epoch; every row once, the last few in a part batch.

    Rows are shuffled, sorted by length within stretches of about 128 batches, cut into batches, and
    the batches shuffled: little padding, yet other neighbours in every epoch. A pure function of
    its arguments, so that every method of a comparison sees the same batches in the same order.
    """
    rows_key, batches_key = np.random.SeedSequence([_STREAM, seed, epoch]).spawn(2)
    rows = _permutation(len(lengths), rows_key)
    batches: list[list[int]] = []
    for start, end in itertools.pairwise(_stretches(len(rows), batch_size)):
        batches += _cut(sorted(rows[start:end], key=lambda row: lengths[row]), batch_size)
    return [batches[index] for index in _permutation(len(batches), batches_key)]


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the rows of each batch, longest rows first: what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    return _cut(order, batch_size)[::-1]


def collate(rows: Sequence[Encoded], *, pad_id: int, row_indices: Sequence[int] = ()) -> Batch:
    """Rows padded on the right with `pad_id` to the longest of them.

    Labels are the rows' classes, or where the rows have targets, these padded with -100.
    """
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.tensor(row.input_ids)
        attention_mask[index, :length] = 1
        if row.targets is not None:
            targets[index, :length] = torch.tensor(row.targets)
    labels = [row.label for row in rows if row.label is not None]
    is_causal = rows[0].targets is not None
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=targets if is_causal else torch.tensor(labels, dtype=torch.int64),
        ids=tuple(row.id for row in rows),
        row_indices=tuple(row_indices),
    )


def order_hash(batches: Iterable[Sequence[int]]) -> str:
    """SHA-256 of the rows of each batch, in order: equal hashes mean the same data order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(",".join(map(str, batch)).encode() + b"\n")
    return digest.hexdigest()


def padding_waste(batches: Iterable[Sequence[int]], lengths: Sequence[int]) -> float:
    """The share of a model's token positions that hold padding, in [0, 1)."""
    real = padded = 0
    for batch in batches:
        real += sum(lengths[row] for row in batch)
        padded += len(batch) * max(lengths[row] for row in batch)
    return 1 - real / padded if padded else 0.0


def _permutation(size: int, key: np.random.SeedSequence) -> list[int]:
    # numpy promises the raw stream of PCG64 for all versions, not what `permutation` makes of it
    raw = np.random.PCG64(key).random_raw(size)
    return np.argsort(raw, kind="stable").tolist()


def _stretches(num_rows: int, batch_size: int) -> list[int]:
    """Where the stretches begin and end: of about equal size, in whole batches but for the last."""
    num_batches = math.ceil(num_rows / batch_size)
    count = max(1, round(num_batches / _STRETCH_BATCHES))
    return [min(round(i * num_batches / count) * batch_size, num_rows) for i in range(count + 1)]


def _cut(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows sorted by length; a part batch holds the longest, which pad most."""
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
