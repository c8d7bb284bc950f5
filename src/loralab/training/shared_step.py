"""The gradients of a step of several runs over one base, in one pass where the model allows it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from loralab.data import Row
from loralab.training.forward import objective_of
from loralab.training.methods import Trainable
from loralab.training.objective import Joint, MakesJoint
from loralab.training.optimiser import Optimiser
from loralab.training.step import Outcome, Stepper, pieces_of, total_targets
from loralab.training.streams import RunStream
from loralab.training.together import Together


class SharedStep:
    """Runs that share a base: forward and backward for all at once, or in turns."""

    def __init__(self, trainables: Sequence[Trainable], steppers: Sequence[Stepper]) -> None:
        self._trainables = trainables
        self._steppers = steppers
        self._joint = joint_of(trainables)

    def gradients(
        self, steps: Mapping[int, int], rows: Mapping[int, Sequence[Row]]
    ) -> dict[int, Tensor]:
        """The loss of each run's rows, by its number; the gradients are left at its parameters.

        steps: the number of the step that each run does, from 1.
        """
        if self._joint is None or len(rows) == 1:
            return {n: self._steppers[n].gradients(steps[n], own) for n, own in rows.items()}
        self._trainables[0].model.train()
        random, losses, pieces, totals = {}, {}, {}, {}
        for n, own in rows.items():
            training = self._trainables[n].training
            random[n] = RunStream(training.seed, steps[n], self._trainables[n].device)
            pieces[n], totals[n] = pieces_of(own, training), total_targets(own)
            losses[n] = torch.zeros(())
        for turn in zip_longest(*pieces.values()):
            given = {n: piece for n, piece in zip(pieces, turn, strict=True) if piece is not None}
            sums = self._joint.nll_sums(
                {self._route(n): piece for n, piece in given.items()},
                {self._route(n): random[n] for n in given},
            )
            means = {n: sums[self._route(n)] / totals[n] for n in given}
            torch.stack(list(means.values())).sum().backward()
            for n, mean in means.items():
                losses[n] = losses[n] + mean.detach().float()
        return losses

    def _route(self, number: int) -> str:
        return str(self._trainables[number].route)


def joint_of(trainables: Sequence[Trainable]) -> Joint | None:
    """How to run them at once, where that gives what each would compute alone."""
    first = trainables[0]
    if first.training.activation_checkpointing or first.training.offload_activations:
        return None
    if any(t.method.dora or t.method.biases != "none" for t in trainables):
        return None
    if callable(first.task):
        if not isinstance(first.task, MakesJoint) or any(t.method.dropout for t in trainables):
            return None
        return first.task.joint(first.model)
    return Together.of(first.model, first.task, fuse_blocks=first.training.fuse_blocks)


def repeatable_pass(
    trainables: Sequence[Trainable], rows: Sequence[Sequence[Row]]
) -> Callable[[], list[Outcome]]:
    """A whole step of every run at every call, each on its rows: `repeatable_step` of a pass."""
    optimisers = [Optimiser(trainable.groups, trainable.training) for trainable in trainables]
    steppers = [
        Stepper(trainable, optimiser, objective_of(trainable))
        for trainable, optimiser in zip(trainables, optimisers, strict=True)
    ]
    shared = SharedStep(trainables, steppers)
    done = 0

    def step() -> list[Outcome]:
        nonlocal done
        done += 1
        numbers = range(len(trainables))
        losses = shared.gradients(dict.fromkeys(numbers, done), dict(enumerate(rows)))
        enqueued = [steppers[n].conclude(done, rows[n], losses[n], 1.0) for n in numbers]
        return [stepper.outcome(own) for stepper, own in zip(steppers, enqueued, strict=True)]

    return step
