"""What a store needs of whatever puts adapters into service."""

from typing import Protocol, runtime_checkable

from loralab.adapters import Adapter
from loralab.serving.store.versions import Proof, Version


@runtime_checkable
class Place(Protocol):
    """Where adapters are put into service; its methods are called from the store's threads."""

    def misfits(self, outline: Adapter) -> list[str]:
        """What keeps an adapter of these names and shapes from being served; empty for nothing."""
        ...

    def attach(self, version: Version, adapter: Adapter) -> Proof:
        """Puts it into the model under `version.hosted` and proves it; as before on any error."""
        ...

    def detach(self, version: Version) -> None:
        """Takes it out of the model."""
        ...
