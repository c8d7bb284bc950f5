"""Where a loss or gradient that is not a number came from: the step is done again, watched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from loralab.data import Row
from loralab.errors import TrainingError
from loralab.training.methods import Trainable
from loralab.training.objective import Objective
from loralab.training.streams import dropout_stream


def blame(
    trainable: Trainable,
    objective: Objective,
    pieces: Sequence[Sequence[Row]],
    step: int,
    gradients: Callable[[], Mapping[str, Tensor | None]],
) -> TrainingError:
    """The error that names where the first number of step `step` that is not finite appeared.

    Looks at the weights, then at each module's output in the order of computation, then at the
    gradients from the loss backwards, which `gradients` computes again. The weights must be those
    that the step began with.
    """
    origin = (
        _bad_weight(trainable.model)
        or _bad_output(trainable, objective, pieces, step)
        or _bad_gradient(gradients())
        or "the loss itself"
    )
    half = any(p.dtype == torch.float16 for p in trainable.model.parameters())
    return TrainingError(
        f"step {step}: the loss or a gradient is not a number; it came from {origin}",
        "set model.dtype to 'bfloat16' (float16 overflows beyond 65,504)."
        if half
        else "lower training.learning_rate or lengthen training.warmup, and look at the rows "
        f"{', '.join(row.id for piece in pieces for row in piece[:3])}.",
    )


def _bad_weight(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weights {name}, which the step before made so"
    return None


def _bad_output(
    trainable: Trainable, objective: Objective, pieces: Sequence[Sequence[Row]], step: int
) -> str | None:
    for_step = dropout_stream(trainable.training.seed, step, trainable.device)
    with _watched(trainable.model) as seen, for_step, torch.no_grad():
        for piece in pieces:
            objective.nll_sum(piece)
            if seen:
                return f"the output of {seen[0]}"
    return None


def _bad_gradient(gradients: Mapping[str, Tensor | None]) -> str | None:
    bad = [name for name, g in gradients.items() if g is not None and not _finite(g)]
    return f"the gradient of {bad[-1]}" if bad else None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collects the modules whose output is not finite, innermost first."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = (t for t in tree_iter(output) if isinstance(t, Tensor))
            if not all(_finite(t) for t in tensors):
                seen.append(f"{name} ({type(_module).__name__})")

        return look

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
