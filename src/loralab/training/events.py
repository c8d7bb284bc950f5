"""What `fit` tells its caller, one small value at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One thing the doctor noticed. `next_step` is empty where nothing needs to be done."""

    level: Literal["info", "warning", "error"]
    name: str  # a short stable key: "warmup", "learning-rate", ...
    message: str
    next_step: str = ""


@dataclass(frozen=True)
class Started:
    """The run is laid out; `step` steps were already done (0 unless it resumes)."""

    step: int
    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    order_hash: str  # of the whole order of batches: equal for every method with the same seed
    environment: dict[str, Any]  # versions, device, threads, dtypes: what the bits depend on
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class StepDone:
    """One optimiser step. `loss` is the mean over the step's targets, in nats."""

    step: int
    epoch: int  # counted from 1
    loss: float
    learning_rates: dict[str, float]  # by role: "base", "adapter", "head"
    grad_norm: float  # before clipping
    rows: int
    tokens: int  # real tokens, without padding
    seconds: float


@dataclass(frozen=True)
class Examined:
    """What the doctor saw in the gradients of the first two steps."""

    step: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Validated:
    """The whole validation set was scored: mean nll (or loss) a row, or a target token (causal)."""

    step: int
    nll: float
    accuracy: float | None  # None where nothing is right or wrong
    best: bool
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved:
    """The run can be resumed from here."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The run is over and the model holds its best weights (the last ones without validation)."""

    step: int
    best_step: int
    best_nll: float | None
    best_accuracy: float | None
    stopped_early: bool


Event = Started | StepDone | Examined | Validated | CheckpointSaved | Finished
