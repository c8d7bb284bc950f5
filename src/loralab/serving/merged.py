"""One adapter in the base's weights while it is alone, and the base back when another comes."""

import logging
import time
from pathlib import Path

from torch import nn

from loralab.adapters import merge_in_place, restore
from loralab.errors import AdapterError
from loralab.serving.policy import MergePolicy

logger = logging.getLogger("loralab")


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
        self.num_merges = 0
        self._first = first
        self._refused: set[str] = set()
        self._merge_seconds = 0.0

    def wanted(self, alone: str | None) -> bool:
        """Whether the adapter that is alone should be merged now."""
        if alone is None or self.name is not None or alone in self._refused:
            return False
        return alone in (self._first, self.policy.wanted())

    def merge(self, name: str) -> bool:
        """Merges; False, for good, where this adapter cannot be merged."""
        started = time.perf_counter()
        try:
            merge_in_place(self.model, name, base_folder=self.base_folder)
        except AdapterError as error:
            logger.warning("adapter %r stays apart from the weights: %s", name, error.cause)
            self._refused.add(name)
            return False
        self.name, self._first = name, None
        self.num_merges += 1
        self._merge_seconds = time.perf_counter() - started
        logger.info("adapter %r is merged (%.0f ms)", name, 1000 * self._merge_seconds)
        return True

    def restore(self) -> None:
        """Gives the base its own bytes back."""
        started = time.perf_counter()
        restore(self.model)
        seconds = time.perf_counter() - started
        logger.info("adapter %r is apart again (%.0f ms)", self.name, 1000 * seconds)
        self.name = None
        self.policy.cost_seconds = self._merge_seconds + seconds
        self.policy.interrupted()
