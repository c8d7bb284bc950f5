"""Sources -> examples -> splits -> batches without padding waste."""

from loralab.data.batching import (
    collate,
    epoch_batches,
    evaluation_batches,
    order_hash,
    padding_waste,
)
from loralab.data.encoding import encode, encoding_facts
from loralab.data.examples import IGNORED, Batch, Dataset, Encoded, Example, Message, Row
from loralab.data.loading import load_dataset, load_rows
from loralab.data.splitting import halves, sample

__all__ = [
    "IGNORED",
    "Batch",
    "Dataset",
    "Encoded",
    "Example",
    "Message",
    "Row",
    "collate",
    "encode",
    "encoding_facts",
    "epoch_batches",
    "evaluation_batches",
    "halves",
    "load_dataset",
    "load_rows",
    "order_hash",
    "padding_waste",
    "sample",
]
