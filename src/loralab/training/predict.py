"""What a model says about rows, one value a row."""

from collections.abc import Sequence

import torch
from torch import nn

from loralab.config import Task
from loralab.data import Encoded, Row, evaluation_batches
from loralab.models import evaluating
from loralab.training.forward import Forward
from loralab.training.objective import Objective, Prediction


def predict(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    task: Task,
    batch_size: int = 64,
    route: str | None = None,
) -> list[Prediction]:
    """Score `rows` in evaluation mode, in their own order, on the model's device.

    `route` names the adapter in use; None leaves the route that is open. The batches depend on
    the rows' lengths alone, so that the same rows give the same bits.
    """
    return predict_with(Forward(model, task, route=route), rows, batch_size=batch_size)


def predict_with(objective: Objective, rows: Sequence[Row], *, batch_size: int) -> list[Prediction]:
    """As `predict`, with a ready objective."""
    found: dict[int, Prediction] = {}
    with evaluating(objective.model), torch.inference_mode():
        for batch in evaluation_batches([row.num_tokens for row in rows], batch_size):
            members = [rows[index] for index in batch]
            found.update(zip(batch, objective.answers(members), strict=True))
    return [found[index] for index in range(len(rows))]
