"""Adapters that were read and wait in memory, the least recently used making room."""

from collections import OrderedDict
from collections.abc import Callable, Container

from loralab.adapters import Adapter
from loralab.serving.store.versions import Version


class Memory:
    """Values by version, at most so many bytes of them; not safe between threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._values: OrderedDict[Version, Adapter] = OrderedDict()

    def __contains__(self, version: Version | None) -> bool:
        return version in self._values

    @property
    def num_bytes(self) -> int:
        """What all of them take."""
        return sum(version.num_bytes for version in self._values)

    def put(self, version: Version, adapter: Adapter, keep: Callable[[Version], bool]) -> None:
        """Keeps a value; others go until there is room, but for those that `keep` names."""
        self._values[version] = adapter
        self._values.move_to_end(version)
        for other in list(self._values):
            if self.num_bytes <= self.max_bytes:
                return
            if other != version and not keep(other):
                del self._values[other]

    def get(self, version: Version) -> Adapter | None:
        """The value, which counts as used now."""
        if version in self._values:
            self._values.move_to_end(version)
        return self._values.get(version)

    def drop(self, version: Version) -> None:
        """Forgets a value."""
        self._values.pop(version, None)

    def keep_only(self, wanted: Container[Version]) -> None:
        """Forgets every other value."""
        for version in [v for v in self._values if v not in wanted]:
            del self._values[version]
