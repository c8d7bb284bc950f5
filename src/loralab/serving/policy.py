"""When merging one adapter into the weights pays.

Merging and restoring stop the engine for a moment; while merged, each step is a little shorter.
How long an adapter will stay alone is not known, as with renting or buying skis (Karlin et al.,
"Competitive snoopy caching", 1988): whoever buys once the rent paid equals the price pays at most
twice what knowing the future would have cost. So the adapter is merged once it has been alone for
as long as makes the time that merging would have saved equal to what merging costs.
"""

from dataclasses import dataclass


@dataclass
class MergePolicy:
    """Watches who runs, and says which adapter should be merged.

    saving: the share of a step that merged weights save; 0 never merges.
    cost_seconds: what merging and restoring take together; replaced by what they took.
    """

    saving: float = 0.1
    cost_seconds: float = 1.0
    _alone: str | None = None
    _seconds: float = 0.0

    def ran(self, alone: str | None, seconds: float) -> None:
        """A step of so many seconds; `alone` is the one adapter that all its rows used."""
        if alone != self._alone:
            self._alone, self._seconds = alone, 0.0
        self._seconds += seconds

    def wanted(self) -> str | None:
        """The adapter that should be in the weights by now."""
        pays = self._seconds * self.saving >= self.cost_seconds and self.saving > 0
        return self._alone if pays else None

    def interrupted(self) -> None:
        """Someone else came: the time alone starts anew."""
        self._alone, self._seconds = None, 0.0
