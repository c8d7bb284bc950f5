"""An adapter's versions, and what is known of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

HASH_DIGITS = 12  # of a content hash, where it is part of a name
Tier = Literal["device", "memory", "disk"]
ProofState = Literal["proved", "unproved"]


@dataclass(frozen=True)
class Proof:
    """What was found when an adapter was put into service.

    state: "unproved" where it is applied, but nothing tells whether as it was trained.
    detail: in words, why it is unproved.
    effect_nats: how far the adapter moves the base's log-likelihoods, at most, over the probes.
    error_nats: how far they are from those stored with the adapter, at most; None without any.
    proof_ms: what it took; near zero where it was known from an earlier time (`cached`).
    """

    state: ProofState
    detail: str = ""
    effect_nats: float | None = None
    error_nats: float | None = None
    proof_ms: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class Version:
    """An adapter with a certain content. It never changes: another content is another version.

    name: what requests call it.
    content: SHA-256 of what it does (`loralab.adapters.content_hash`).
    labels: the names that its file gives the classes it tells apart; empty where it gives none.
    """

    name: str
    content: str
    num_bytes: int = field(default=0, compare=False)
    rank: int = field(default=0, compare=False)
    labels: tuple[str, ...] = field(default=(), compare=False)

    @property
    def hosted(self) -> str:
        """The name it has in the model, where versions of one adapter stand side by side.

        Names of parameters hold no dots of ours, so those of the adapter's name are written %2E.
        """
        return f"{self.name.replace('.', '%2E')}@{self.content[:HASH_DIGITS]}"

    @property
    def fingerprint(self) -> str:
        """What a reader is told: the name and the beginning of the content's hash."""
        return f"{self.name}@{self.content[:HASH_DIGITS]}"


def identity(weights: Mapping[Version, float | int]) -> str:
    """What a mix of versions stands for, by content alone; "" for the base.

    Keys and values of earlier requests are reused only where it is equal.
    """
    parts = sorted((version.content, float(weight)) for version, weight in weights.items())
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    return "+".join(f"{content}*{weight!r}" for content, weight in parts)


@dataclass(frozen=True)
class AdapterState:
    """What the store tells of one adapter.

    version: None until it was read for the first time.
    refused: why the folder's present content is not served; an earlier version may still be.
    num_leases: requests that use any version of it now.
    """

    name: str
    folder: str
    version: Version | None
    tier: Tier
    pinned: bool
    num_leases: int
    proof: Proof | None
    refused: str | None


@dataclass(frozen=True)
class StoreEvent:
    """Something happened to an adapter: "loaded" (seconds), "evicted", "refused" (detail)."""

    kind: Literal["loaded", "evicted", "refused"]
    name: str
    seconds: float = 0.0
    detail: str = ""
