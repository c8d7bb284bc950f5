"""Rows as a model takes them."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from loralab.data import Batch, Encoded, Row, collate
from loralab.errors import DataError
from loralab.placement import send


def text_rows(rows: Sequence[Row]) -> list[Encoded]:
    """`rows`, where they are all text. Raises `DataError`."""
    texts = [row for row in rows if isinstance(row, Encoded)]
    if len(texts) < len(rows):
        raise DataError("there are rows that are no text", "give `prepare` what makes their loss.")
    return texts


def batch_for(model: nn.Module, rows: Sequence[Encoded]) -> Batch:
    """`rows` padded to the longest: ids and mask on the model's device, labels on the CPU.

    What fills short rows is the model's padding token (0 without one): the mask says what is
    padding, but RoBERTa's positions are counted by that id. Raises `DataError` where a row has
    neither label nor targets.
    """
    bare = [row.id for row in rows if row.label is None and row.targets is None]
    if bare:
        raise DataError(f"rows without a label: {', '.join(bare[:3])}", "give every row a label.")
    pad_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    batch = collate(rows, pad_id=0 if pad_id is None else pad_id)
    device = next(model.parameters()).device
    return dataclasses.replace(
        batch,
        input_ids=send(batch.input_ids, device),
        attention_mask=send(batch.attention_mask, device),
    )
