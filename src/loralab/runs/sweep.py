"""Finding a method's best learning rate: a grid that is extended until it brackets the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loralab.config import MethodKind

DEFAULT_RATES: dict[MethodKind, tuple[float, ...]] = {
    "head": (1e-3, 3e-3, 1e-2),
    "lora": (1e-4, 3e-4, 1e-3),
    "frozen": (1e-5, 3e-5, 1e-4),
    "full": (1e-5, 3e-5, 1e-4),
}
"""Where a recipe gives no grid. LoRA's best rate is about ten times full fine-tuning's
("LoRA Without Regret", Schulman et al. 2025: 9.8 over 14 models)."""

LARGEST_RATE = 1.0


@dataclass(frozen=True)
class Sweep:
    """Validation losses by learning rate; `bracketed`: the best rate is no edge of the grid."""

    losses: dict[float, float]
    bracketed: bool

    @property
    def best_rate(self) -> float:
        """The rate of the least validation loss (a diverged run's loss is infinite)."""
        return min(self.losses, key=lambda rate: (self.losses[rate], rate))


def sweep(
    rates: Sequence[float], loss_at: Callable[[float], float], *, max_extensions: int
) -> Sweep:
    """Evaluate `loss_at` on the grid, and beyond the edge the best lies on, until it brackets.

    A grid is extended at most `max_extensions` times, each time by the grid's own ratio.
    """
    losses = {rate: loss_at(rate) for rate in sorted(set(rates))}
    for _ in range(max_extensions):
        beyond = _beyond_the_edge(losses)
        if beyond is None or beyond in losses:
            break
        losses[beyond] = loss_at(beyond)
    ordered = dict(sorted(losses.items()))
    return Sweep(ordered, bracketed=_beyond_the_edge(ordered) is None and _any_finite(ordered))


def _beyond_the_edge(losses: dict[float, float]) -> float | None:
    """The next rate outwards where the best is an edge; None where it is bracketed."""
    if not _any_finite(losses):
        return _rounded(min(losses) / _ratio(losses))
    rates = sorted(losses)
    best = min(rates, key=lambda rate: (losses[rate], rate))
    if best == rates[0]:
        return _rounded(best / _ratio(losses))
    if best == rates[-1]:
        return _rounded(min(best * _ratio(losses), LARGEST_RATE))
    return None


def _ratio(losses: dict[float, float]) -> float:
    """The grid's geometric step; 3 for a single rate."""
    rates = sorted(losses)
    if len(rates) < 2:
        return 3.0
    return (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))


def _any_finite(losses: dict[float, float]) -> bool:
    return any(math.isfinite(loss) for loss in losses.values())


def _rounded(rate: float) -> float:
    """Two digits: 3e-3 times 3.33 is 1e-2 to a reader."""
    return float(f"{rate:.1e}")
