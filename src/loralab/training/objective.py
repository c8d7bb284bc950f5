"""What a run minimises, and what a model says about a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from loralab.training.streams import RunStream


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


@runtime_checkable
class Objective(Protocol):
    """The loss of rows of one kind through one model: `Forward` for text, others for images.

    Its rows are `data.Row`s; which kind, the one who makes it knows.
    """

    model: nn.Module

    def nll_sum(self, rows: Sequence[Any]) -> Float[Tensor, ""]:
        """The loss of all targets of `rows`, for training.

        Whatever it draws comes from torch's default generator, which the loop seeds each step.
        """
        ...

    def answers(self, rows: Sequence[Any]) -> list[Prediction]:
        """What the model says about each row: the same at every call."""
        ...


@runtime_checkable
class Joint(Protocol):
    """The losses of several runs from one forward: as many objectives, each on its own route."""

    def nll_sums(
        self, rows: Mapping[str, Sequence[Any]], random: Mapping[str, RunStream]
    ) -> dict[str, Float[Tensor, ""]]:
        """`Objective.nll_sum` of each route's rows, which draws from the route's own stream."""
        ...


@runtime_checkable
class MakesJoint(Protocol):
    """A `MakesObjective` that knows how its runs share a forward."""

    def joint(self, model: nn.Module) -> Joint:
        """For runs whose adapters `model` hosts."""
        ...


MakesObjective = Callable[[nn.Module, str | None], Objective]
"""(model, route) -> the objective of a run whose rows are no text."""


def mean_nll(predictions: Sequence[Prediction]) -> float:
    """Mean nll a target: a row (classification) or a token (causal)."""
    return sum(p.nll for p in predictions) / max(1, sum(p.num_targets for p in predictions))


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Share of targets that were the likeliest choice."""
    num_targets = max(1, sum(p.num_targets for p in predictions))
    return sum(p.num_correct for p in predictions) / num_targets
