"""How far an adapter's first steps go: the two numbers that rank, alpha and init stand for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from loralab.lowrank import Setting
from loralab.training.methods import ADAPTER_NAME, Trainable


@dataclass(frozen=True)
class EffectiveStep:
    """What Adam sees of a setting (`lowrank.scaling`): of the adapter's median module.

    effective_step: `scale * std(A) * learning rate of B`, what one component gives an entry of
        the first update; `lowest` and `highest` are the extremes over the modules.
    first_update: `rank * effective_step`; under Adam the components point the same way.
    steps_before_A_moves: `std(A) / learning rate of A`, in optimiser steps.
    """

    effective_step: float
    lowest: float
    highest: float
    first_update: float
    steps_before_A_moves: float  # noqa: N815  (A and B are the factors' names)
    scale: float
    std_A: float  # noqa: N815
    learning_rate_A: float  # noqa: N815
    learning_rate_B: float  # noqa: N815

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """One line: the product and its factors."""
        spread = ""
        if self.highest > 1.01 * self.lowest:
            spread = f" (median; {self.lowest:.3g} to {self.highest:.3g} over the modules)"
        return (
            f"effective step scale * std(A) * rate = {self.effective_step:.3g}{spread}: scale "
            f"{self.scale:.3g}, std(A) {self.std_A:.3g}, rate of B {self.learning_rate_B:.3g}; A "
            f"itself moves after about {max(1, round(self.steps_before_A_moves))} steps"
        )


def effective_step(trainable: Trainable) -> EffectiveStep | None:
    """Of the A that the modules hold now, so to be asked before training.

    None where there is no adapter, or a model without values ("meta").
    """
    settings = module_settings(trainable)
    return summarise(list(settings.values())) if settings else None


def module_settings(trainable: Trainable) -> dict[str, Setting]:
    """What each adapted module starts with, by its name; std is that of the A it holds."""
    config, pairs = trainable.adapter, trainable.pairs
    if config is None or any(A.is_meta for A, _ in pairs.values()) or not pairs:
        return {}
    rates = {name: group.learning_rate for group in trainable.groups for name in group.parameters}
    marker = f".adapters.{ADAPTER_NAME}."
    stds = torch.stack([A.detach().std(correction=0) for A, _ in pairs.values()]).tolist()
    return {
        module: Setting(
            rank=A.shape[0],
            alpha=config.alpha_at(module),
            scaling=config.scaling,
            std=std,
            learning_rate_A=rates[f"{module}{marker}A"],
            learning_rate_B=rates[f"{module}{marker}B"],
        )
        for (module, (A, _)), std in zip(pairs.items(), stds, strict=True)
    }


def summarise(settings: Sequence[Setting]) -> EffectiveStep:
    """The setting whose effective step is the (lower) median, with the extremes of all."""
    ordered = sorted(settings, key=lambda setting: setting.effective_step)
    middle = ordered[(len(ordered) - 1) // 2]
    return EffectiveStep(
        effective_step=middle.effective_step,
        lowest=ordered[0].effective_step,
        highest=ordered[-1].effective_step,
        first_update=middle.first_update,
        steps_before_A_moves=middle.steps_before_A_moves,
        scale=middle.scale,
        std_A=middle.std,
        learning_rate_A=middle.learning_rate_A,
        learning_rate_B=middle.learning_rate_B,
    )
