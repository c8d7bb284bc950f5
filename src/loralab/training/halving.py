"""Successive halving (1502.07943): which runs of a contest stop, and after which step.

A decision rests on the runs' validations alone, never on when somebody looked: a contest that was
interrupted goes on to the same end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RUNGS = (0.25, 0.5)
"""Shares of a run after which the worse half stops."""


@dataclass(frozen=True)
class Contender:
    """A run so far. `validations`: nll by step; `ended_at`: the step it ended in, None under way.

    Of runs that are equally good the first by name goes on.
    """

    name: str
    total_steps: int
    validations: Mapping[int, float]
    ended_at: int | None = None

    def reached(self, rung: float) -> int | None:
        """The step of its first validation at or after that share of the run, if it had one."""
        late = (step for step in self.validations if step >= rung * self.total_steps)
        return min(late, default=None)

    def best_until(self, step: int) -> float:
        """The lowest nll up to a step."""
        return min(nll for at, nll in self.validations.items() if at <= step)


@dataclass(frozen=True)
class Stop:
    """Where a run ends, and the nll that put it into the worse half."""

    step: int
    nll: float


def losers(contenders: Sequence[Contender]) -> dict[int, Stop]:
    """The runs that stop, by their number, as far as that is decided.

    A rung is decided once each run that is left has had a validation from there on, or has ended
    without one. All that lose there end after the same step: the one of the last of these.
    """
    found: dict[int, Stop] = {}
    left = list(range(len(contenders)))
    for rung in RUNGS:
        reached = {number: contenders[number].reached(rung) for number in left}
        ends = {n: contenders[n].ended_at if at is None else at for n, at in reached.items()}
        decided = [end for end in ends.values() if end is not None]
        if len(decided) < len(left):
            break
        nll = {n: contenders[n].best_until(step) for n, step in reached.items() if step is not None}
        ranked = sorted(nll, key=lambda number: (nll[number], contenders[number].name))
        half = math.ceil(len(ranked) / 2)
        found |= {number: Stop(max(decided), nll[number]) for number in ranked[half:]}
        left = ranked[:half]
    return found
