"""What a comparison is built from: plain values, filled by whoever ran the trainings."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class RatePoint:
    """One learning rate of a method's sweep, on the validation rows."""

    learning_rate: float
    validation_nll: float
    validation_accuracy: float
    run: str  # the run's name or path, for the reader to find it


@dataclass(frozen=True, eq=False)
class SeedPredictions:
    """One run at the best rate, row by row, in the order of `TestSet.ids`.

    `predictions` are labels; in a causal task 1 where the completion was matched exactly, else 0.
    `nll` is in nats.
    """

    seed: int
    predictions: Int[np.ndarray, " items"]
    nll: Float[np.ndarray, " items"]


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Everything a comparison needs to know of one method.

    `best_learning_rate` is None, and `seeds` empty, where every rate diverged. `bracketed` says
    that the best rate lies inside the grid. `artifact_bytes` is what must be stored for one task;
    `artifact_needs_base` whether the base must be stored beside it (an adapter, a head) or not (a
    whole model). `steps` are optimiser steps of a run.
    """

    method: str
    trainable_parameters: int
    total_parameters: int
    rates: tuple[RatePoint, ...]
    best_learning_rate: float | None
    bracketed: bool
    seeds: tuple[SeedPredictions, ...]
    peak_bytes: int | None
    step_seconds: float | None
    artifact_bytes: int
    artifact_needs_base: bool
    steps: int
    diverged_rates: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class TestSet:
    """The test rows all methods were scored on.

    `groups` names each row's document. `labels` and `label_names` are None in a causal task.
    """

    __test__ = False  # no test class, whatever pytest makes of the name

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: Int[np.ndarray, " items"] | None
    label_names: tuple[str, ...] | None

    @property
    def documents(self) -> np.ndarray | None:
        """Each row's document as a number, or None where every row is its own."""
        _, numbers = np.unique(np.asarray(self.groups), return_inverse=True)
        return None if numbers.max(initial=-1) + 1 == len(self.groups) else numbers

    @property
    def num_documents(self) -> int:
        return len(set(self.groups))
