"""The two real degrees of freedom among rank, alpha, scaling, initialisation and learning rate.

Under Adam (epsilon 0, no weight decay) training is *exactly* unchanged by
`scale -> scale / (p q)`, `A_0 -> p A_0`, `lr_A -> p lr_A`, `lr_B -> q lr_B` (with B_0 = 0)
(Schulman et al. 2025, "LoRA Without Regret"). What is left are two knobs: how far the first step
goes, `scale * std(A) * lr_B`, and how many steps pass before A itself moves, `std(A) / lr_A`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from loralab.errors import AdapterError, nearest
from loralab.lowrank.factors import Number

ScalingName = str  # one of SCALINGS


def alpha_over_rank(alpha: Number, rank: int) -> float:
    """Hu et al. 2021. Under Adam the start of training does not depend on rank."""
    return alpha / rank


def alpha_over_sqrt_rank(alpha: Number, rank: int) -> float:
    """rsLoRA, Kalajdzievski 2023. Under Adam the first step grows with sqrt(rank)."""
    return alpha / math.sqrt(rank)


SCALINGS: dict[ScalingName, Callable[[Number, int], float]] = {
    "alpha/rank": alpha_over_rank,
    "alpha/sqrt(rank)": alpha_over_sqrt_rank,
}


def scale_of(alpha: Number, rank: int, scaling: ScalingName = "alpha/rank") -> float:
    """The factor before `B @ A`. Raises `AdapterError` for an unknown scaling."""
    if scaling not in SCALINGS:
        raise AdapterError(f"unknown scaling {scaling!r}", nearest(scaling, SCALINGS))
    return SCALINGS[scaling](alpha, rank)


def alpha_of(scale: Number, rank: int, scaling: ScalingName = "alpha/rank") -> float:
    """The alpha that gives this scale."""
    return scale / scale_of(1.0, rank, scaling)


def initial_std(init: str, rank: int, in_features: int) -> float:
    """The standard deviation of A's entries at the start, for initialisers with B = 0.

    Raises `AdapterError` for initialisers whose start depends on the weight or on data.
    """
    stds = {
        "kaiming": 1 / math.sqrt(3 * in_features),  # uniform in +-1/sqrt(in)
        "gaussian": 1 / rank,
        "eva": 1 / math.sqrt(in_features),  # orthonormal rows
    }
    if init not in stds:
        raise AdapterError(
            f"initialiser {init!r} has no standard deviation of its own: B does not start at zero",
            "compare effective steps between " + ", ".join(sorted(stds)) + ".",
        )
    return stds[init]


def effective_step(scale: Number, std: Number, learning_rate: Number) -> float:
    """`scale * std(A) * lr`: the size that one component of A gives an entry of the first update.

    Adam's first step moves every entry of B by lr, so an entry of the delta moves by about this
    much a component, whatever alpha says.
    """
    return scale * std * learning_rate


@dataclass(frozen=True)
class Setting:
    """All that decides how a LoRA (B = 0 at the start) begins to move under Adam."""

    rank: int
    alpha: Number
    scaling: ScalingName
    std: Number  # of A's entries at the start; `initial_std`
    learning_rate_A: Number  # noqa: N815  (A and B are the factors' names)
    learning_rate_B: Number  # noqa: N815

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.scaling)

    @property
    def effective_step(self) -> float:
        """`scale * std(A) * lr_B`, a component's share of the first update."""
        return effective_step(self.scale, self.std, self.learning_rate_B)

    @property
    def first_update(self) -> float:
        """`rank * effective_step`: under Adam the components' updates point the same way."""
        return self.rank * self.effective_step

    @property
    def steps_before_A_moves(self) -> float:  # noqa: N802  (A is the factor's name)
        """`std(A) / lr_A`, in optimiser steps."""
        return self.std / self.learning_rate_A


def equivalent(
    setting: Setting,
    *,
    rank: int | None = None,
    scaling: ScalingName | None = None,
    std: Number | None = None,
    alpha: Number | None = None,
) -> Setting:
    """The setting with another rank, scaling, initial std or alpha that starts training the same.

    `first_update` and `steps_before_A_moves` are kept: lr_A follows std(A); alpha takes up the
    rest, or lr_B does where `alpha` is given. At the same rank the two trainings are exactly the
    same under Adam (epsilon 0, no weight decay, A_0 scaled by the ratio of the stds); at another
    rank the first update is the same in expectation.
    """
    wanted = replace(
        setting,
        rank=setting.rank if rank is None else rank,
        scaling=setting.scaling if scaling is None else scaling,
        std=setting.std if std is None else std,
    )
    learning_rate_A = setting.learning_rate_A * wanted.std / setting.std
    product = setting.first_update / (wanted.rank * wanted.std)  # scale * lr_B
    if alpha is None:
        learning_rate_B = setting.learning_rate_B
        alpha = alpha_of(product / learning_rate_B, wanted.rank, wanted.scaling)
    else:
        learning_rate_B = product / scale_of(alpha, wanted.rank, wanted.scaling)
    return replace(
        wanted, alpha=alpha, learning_rate_A=learning_rate_A, learning_rate_B=learning_rate_B
    )
