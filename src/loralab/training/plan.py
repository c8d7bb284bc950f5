"""Which rows each step sees, and when the run validates: known before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from loralab.config import TrainingSection
from loralab.data import Row, epoch_batches, order_hash
from loralab.errors import DataError
from loralab.training.streams import stream_seed


@dataclass(frozen=True)
class Plan:
    """The order of a run, which depends on the rows and the seed but not on the method."""

    lengths: tuple[int, ...]
    rows_per_step: int
    seed: int
    steps_per_epoch: int
    total_steps: int
    validation_steps: frozenset[int]

    def epoch(self, step: int) -> int:
        """The epoch of step `step` (from 1), counted from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def batches(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch (from 1)."""
        return epoch_batches(self.lengths, self.rows_per_step, seed=self.seed, epoch=epoch)

    def order_hash(self) -> str:
        """SHA-256 of the rows of every step of the run, in order."""
        last = self.epoch(self.total_steps)
        order = [batch for epoch in range(1, last + 1) for batch in self.batches(epoch)]
        return order_hash(order[: self.total_steps])


def lay_out(rows: Sequence[Row], training: TrainingSection) -> Plan:
    """The plan of a run.

    A step sees `batch_size * accumulation` rows, drawn as one batch and then cut into pieces of
    `batch_size`: accumulation changes memory, never which rows share a step. Validation falls on
    even shares of every epoch and on the last step.

    Raises `DataError` where there are no rows.
    """
    if not rows:
        raise DataError(
            "there is no row to train on",
            "check data.train and data.min_rating; rows may be filtered out.",
        )
    rows_per_step = training.batch_size * training.accumulation
    steps_per_epoch = ceil(len(rows) / rows_per_step)
    total = training.epochs * steps_per_epoch
    total = min(total, training.max_steps or total)
    shares = training.evaluations_per_epoch
    wanted = {
        epoch * steps_per_epoch + max(1, round(steps_per_epoch * share / shares))
        for epoch in range(training.epochs)
        for share in range(1, shares + 1)
    }
    return Plan(
        lengths=tuple(row.num_tokens for row in rows),
        rows_per_step=rows_per_step,
        seed=stream_seed(training.seed, "data"),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        validation_steps=frozenset(step for step in wanted if step < total) | {total},
    )
