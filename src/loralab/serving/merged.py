"""One adapter in the base's weights while it is alone, and the base back when another comes."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from loralab.adapters import change_at, extract, merge_in_place, restore
from loralab.errors import AdapterError
from loralab.serving.policy import MergePolicy

logger = logging.getLogger("loralab")

MOST_LOST = 0.25
"""Of an adapter's change, lost in the rounding of merged weights: above it the adapter stays apart,
since nobody asked for the merge. A base in fp32 loses nothing, one in 16 bit loses of a small
adapter most."""

SAMPLED_WEIGHTS = 8


class MergedMode:
    """Merges and restores a model on the engine's thread, when its policy says so.

    first: an adapter to merge as soon as it runs alone, without waiting until that pays.
    base_folder: the base's own files, from which it is restored; without it the base's tensors
        wait in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: MergePolicy | None = None,
        *,
        first: str | None = None,
        base_folder: Path | None = None,
    ) -> None:
        self.model, self.policy = model, policy or MergePolicy()
        self.base_folder = base_folder
        self.name: str | None = None  # the adapter that is in the weights
        self._first = first
        self._refused: set[str] = set()
        self._merge_seconds = 0.0

    def wanted(self, alone: str | None) -> bool:
        """Whether the adapter that is alone should be merged now."""
        if alone is None or self.name is not None or alone in self._refused:
            return False
        return alone in (self._first, self.policy.wanted())

    def merge(self, name: str, changed: Callable[[], None]) -> None:
        """Merges, where this adapter can be and loses little by it; `changed` is called then."""
        started = time.perf_counter()
        try:
            lost = rounding_loss(self.model, name)
            if lost > MOST_LOST:
                raise AdapterError(f"rounding would lose {lost:.0%} of it", "serve it apart.")
            merge_in_place(self.model, name, base_folder=self.base_folder)
        except AdapterError as error:
            logger.warning("adapter %r stays apart from the weights: %s", name, error.cause)
            self._refused.add(name)
            return
        self.name, self._first = name, None
        changed()
        self._merge_seconds = time.perf_counter() - started
        logger.info("adapter %r is merged (%.0f ms)", name, 1000 * self._merge_seconds)

    def restore(self, changed: Callable[[], None]) -> None:
        """Gives the base its own bytes back, where an adapter is merged; `changed` is called then.

        Raises `ModelError` where the base's files have changed; the adapter stays merged.
        """
        if self.name is None:
            return
        started = time.perf_counter()
        restore(self.model)
        name, self.name = self.name, None
        changed()
        seconds = time.perf_counter() - started
        logger.info("adapter %r is apart again (%.0f ms)", name, 1000 * seconds)
        self.policy.cost_seconds = self._merge_seconds + seconds
        self.policy.interrupted()


def rounding_loss(model: nn.Module, name: str) -> float:
    """`||merged - (W + delta)|| / ||delta||` over some of the linear layers in 16 bit."""
    adapter = extract(model, name)
    found = [(path, model.get_submodule(path)) for path in adapter.pairs]
    narrow = [
        (path, module.weight)
        for path, module in found
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 2
    ]
    error = change = 0.0
    for path, weight in narrow[:: max(1, len(narrow) // SAMPLED_WEIGHTS)]:
        base = weight.detach().float()
        exact = torch.empty_like(base)
        change_at(adapter, path, weight.device).add(base, exact)
        error += float((exact.to(weight.dtype).float() - exact).square().sum())
        change += float((exact - base).square().sum())
    return (error / change) ** 0.5 if change else 0.0
