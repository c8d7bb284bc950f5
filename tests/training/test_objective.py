"""The loop trains rows that are no text: whatever an objective makes a loss of."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import use
from loralab.config import MethodSection, TrainingSection
from loralab.errors import ConfigError, DataError
from loralab.training import Objective, Prediction, Validated, fit, fit_many, prepare, prepare_many

METHOD = MethodSection(rank=2, alpha=4.0, dropout=0.2)
TRAINING = TrainingSection(
    learning_rate=0.05, batch_size=8, epochs=3, checkpoint_steps=2, evaluations_per_epoch=1
)


@dataclass(frozen=True, eq=False)
class Point:
    """A row of numbers and what is to be said of it."""

    id: str
    values: Float[Tensor, " size"]
    wanted: float
    group: str = "one"
    label: int | None = None
    num_tokens: int = 1
    num_targets: int = 1

    def content(self) -> list[Any]:
        return [hashlib.sha256(self.values.numpy().tobytes()).hexdigest(), self.wanted]


class SquaredError:
    """Mean squared error of noisy inputs, as a denoiser has it."""

    def __init__(self, model: nn.Module, route: str | None) -> None:
        self.model = model
        self._route = route

    def _errors(self, rows: Any, noise: float) -> Tensor:
        inputs = torch.stack([row.values for row in rows])
        wanted = torch.tensor([row.wanted for row in rows])
        with use(self.model, self._route):
            found = self.model(inputs + noise * torch.randn(inputs.shape))
        return F.mse_loss(found.squeeze(-1), wanted, reduction="none")

    def nll_sum(self, rows: Any) -> Tensor:
        return self._errors(rows, noise=0.1).sum()

    @torch.no_grad()
    def answers(self, rows: Any) -> list[Prediction]:
        found = self._errors(rows, noise=0.0).tolist()
        return [
            Prediction(row.id, row.group, None, None, loss, 1, 0, None)
            for row, loss in zip(rows, found, strict=True)
        ]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def points(count: int, seed: int) -> list[Point]:
    values = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return [Point(f"{seed}-{i}", v, float(v.sum())) for i, v in enumerate(values)]


ROWS, HELD_OUT = points(40, 1), points(16, 2)


def trained(trainable: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable.parameters.items()}


def test_an_objective_of_ones_own_is_an_objective() -> None:
    assert isinstance(SquaredError(model(), None), Objective)


def test_the_loop_minimises_it_and_keeps_the_best(tmp_path: Path) -> None:
    trainable = prepare(model(), METHOD, TRAINING, task=SquaredError)
    events = list(fit(trainable, ROWS, HELD_OUT, tmp_path))
    seen = [event for event in events if isinstance(event, Validated)]
    assert [event.accuracy for event in seen] == [None] * 3
    untrained = sum(row.nll for row in SquaredError(model(), None).answers(HELD_OUT)) / 16
    assert seen[-1].nll < seen[0].nll < 0.9 * untrained


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = prepare(model(), METHOD, TRAINING, task=SquaredError)
    list(fit(whole, ROWS, HELD_OUT, tmp_path / "whole"))
    for _ in range(2):  # each time cut after some steps, and begun again from the checkpoint
        parts = prepare(model(), METHOD, TRAINING, task=SquaredError)
        events = fit(parts, ROWS, HELD_OUT, tmp_path / "parts")
        for _, _event in zip(range(9), events, strict=False):
            pass
        events.close()
    parts = prepare(model(), METHOD, TRAINING, task=SquaredError)
    list(fit(parts, ROWS, HELD_OUT, tmp_path / "parts"))
    assert all(torch.equal(a, trained(parts)[n]) for n, a in trained(whole).items())


def test_many_over_one_base_train_as_each_alone(tmp_path: Path) -> None:
    settings = [(METHOD.model_copy(update={"rank": rank}), TRAINING) for rank in (1, 2, 4)]
    alone = []
    for number, (method, training) in enumerate(settings):
        trainable = prepare(model(), method, training, task=SquaredError)
        list(fit(trainable, ROWS, HELD_OUT, tmp_path / f"alone-{number}"))
        alone.append(trained(trainable))
    together = prepare_many(model(), settings, task=SquaredError)
    folders = [tmp_path / f"together-{number}" for number in range(3)]
    list(fit_many(together, [ROWS] * 3, [HELD_OUT] * 3, folders))
    for one, trainable in zip(alone, together, strict=True):
        assert all(torch.equal(a, trained(trainable)[name]) for name, a in one.items())


def test_a_start_from_text_is_refused_by_name() -> None:
    method = METHOD.model_copy(update={"init": "eva"})
    with pytest.raises(ConfigError, match=r"method.init 'eva' looks at rows of text"):
        prepare(model(), method, TRAINING, task=SquaredError, rows=ROWS)


def test_rows_that_are_no_text_need_an_objective(tmp_path: Path) -> None:
    trainable = prepare(model(), METHOD, TRAINING, task=SquaredError)
    bare = type(trainable)(**{**vars(trainable), "task": "classification"})
    with pytest.raises(DataError, match="rows that are no text"):
        list(fit(bare, ROWS, HELD_OUT, tmp_path))
