"""What a model says about rows, one value a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loralab.config import Task
from loralab.data import Encoded, evaluation_batches
from loralab.models import evaluating
from loralab.training.forward import Forward, TargetLogits


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one row.

    Classification: `prediction` is the likeliest class, `nll` is -log p(label), `num_targets` 1.
    Causal: `nll` is summed over the row's target tokens (minus its log-likelihood), and `exact`
    says whether every target token was the likeliest one given the true ones before it.
    """

    id: str
    group: str
    label: int | None
    prediction: int | None
    nll: float
    num_targets: int
    num_correct: int  # targets that were the likeliest choice
    probabilities: tuple[float, ...] | None

    @property
    def exact(self) -> bool:
        """Whether every target was the likeliest choice."""
        return self.num_correct == self.num_targets


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


def predict_with(forward: Forward, rows: Sequence[Encoded], *, batch_size: int) -> list[Prediction]:
    """As `predict`, with a ready `Forward`."""
    found: dict[int, Prediction] = {}
    with evaluating(forward.model), torch.inference_mode():
        for batch in evaluation_batches([len(row.input_ids) for row in rows], batch_size):
            members = [rows[index] for index in batch]
            answers = _answers(forward(members), members, forward.task)
            found.update(zip(batch, answers, strict=True))
    return [found[index] for index in range(len(rows))]


def mean_nll(predictions: Sequence[Prediction]) -> float:
    """Mean nll a target: a row (classification) or a token (causal)."""
    return sum(p.nll for p in predictions) / max(1, sum(p.num_targets for p in predictions))


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Share of targets that were the likeliest choice."""
    num_targets = max(1, sum(p.num_targets for p in predictions))
    return sum(p.num_correct for p in predictions) / num_targets


def _answers(scored: TargetLogits, rows: Sequence[Encoded], task: Task) -> list[Prediction]:
    choices = scored.logits.argmax(dim=-1)
    correct = (choices == scored.targets).tolist()
    nll = scored.nll().double().tolist()
    if task == "classification":
        probabilities = scored.logits.double().softmax(dim=-1).tolist()
        return [
            Prediction(
                row.id, row.group, row.label, choice, loss, 1, int(right), tuple(distribution)
            )
            for row, choice, loss, right, distribution in zip(
                rows, choices.tolist(), nll, correct, probabilities, strict=True
            )
        ]
    sums, hits, counts = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    for row, loss, right in zip(scored.rows.tolist(), nll, correct, strict=True):
        sums[row] += loss
        hits[row] += right
        counts[row] += 1
    return [
        Prediction(row.id, row.group, None, None, sums[i], counts[i], hits[i], None)
        for i, row in enumerate(rows)
    ]
