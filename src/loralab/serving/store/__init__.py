"""Adapters between a folder, memory and the slots of a model, leased to requests."""

from loralab.serving.store.leases import Lease
from loralab.serving.store.place import Place
from loralab.serving.store.reading import Limits
from loralab.serving.store.registry import NAME, Registry, is_name
from loralab.serving.store.store import AdapterStore
from loralab.serving.store.versions import (
    AdapterState,
    Proof,
    StoreEvent,
    Version,
    identity,
)
from loralab.serving.store.working_set import Report, WorkingSet

__all__ = [
    "NAME",
    "AdapterState",
    "AdapterStore",
    "Lease",
    "Limits",
    "Place",
    "Proof",
    "Registry",
    "Report",
    "StoreEvent",
    "Version",
    "WorkingSet",
    "identity",
    "is_name",
]
