"""How the learning rate moves over a run, as a factor on the base rate."""

import math
from dataclasses import dataclass
from typing import Literal

from loralab.config import TrainingSection

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, then constant, linear or cosine decay towards zero.

    The first step of a warm-up is 1 / warmup_steps, never zero: a step that cannot move the
    weights is a wasted batch. The last step of a decay is not zero either, for the same reason.
    """

    shape: Shape
    total_steps: int
    warmup_steps: int

    def factor(self, step: int) -> float:
        """The factor of step `step`, counted from 1 to `total_steps`."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        done = (step - self.warmup_steps - 1) / (self.total_steps - self.warmup_steps)
        if self.shape == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + math.cos(math.pi * done))


def build_schedule(training: TrainingSection, total_steps: int) -> Schedule:
    """The schedule of a run of `total_steps`; the warm-up is its fraction, rounded."""
    warmup_steps = round(training.warmup * total_steps)
    return Schedule(training.schedule, total_steps, warmup_steps)
