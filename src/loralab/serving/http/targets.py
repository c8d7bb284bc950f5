"""Which adapters a request's `model` means."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loralab.errors import RequestError
from loralab.serving.requests import Entry
from loralab.serving.store import Lease, Version, identity

MIX = "(mix)"  # the label of all mixes in the metrics, so that weights make no labels


@dataclass(frozen=True)
class Target:
    """weights: adapter -> weight; none for the base. named: all adapters, of weight 0 too."""

    model: str
    base: str
    weights: Mapping[str, float]
    named: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are needed."""
        return tuple(self.weights)

    @property
    def counted(self) -> tuple[str, ...]:
        """The names whose quotas the request uses up."""
        return self.names or (self.base,)

    @property
    def tenant(self) -> str:
        """In whose queue it waits: mixes of the same adapters wait in one, whatever the weights."""
        return "+".join(sorted(self.counted))

    @property
    def label(self) -> str:
        """In the metrics."""
        return self.counted[0] if len(self.counted) == 1 else MIX


@dataclass(frozen=True)
class Resolved:
    """A target whose adapters are in the model.

    fingerprint: what the answer says of itself. labels: the adapters' names of their classes.
    """

    entry: Entry
    identity: str
    fingerprint: str
    labels: tuple[str, ...] = ()


def parse_target(model: str, base: str) -> Target:
    """`base`, `adapter`, or a mix `a=0.7,b=-0.3`, in which a name that stands twice counts with the
    sum of its weights. Raises `RequestError` for what is none."""
    if model == base:
        return Target(model, base, {})
    if "=" not in model:
        return Target(model, base, {model: 1.0}, (model,))
    weights: dict[str, float] = {}
    faults = []
    for part in model.split(","):
        name, _, number = part.partition("=")
        name = name.strip()
        try:
            weight = weights.get(name, 0.0) + float(number)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            faults.append(f"{part.strip()!r} is not of the form name=weight")
        elif name == base:
            faults.append(f"{name!r} is the base")
        weights[name] = weight
    if faults:
        raise RequestError(
            f"model: {'; '.join(faults)}", "write a mix as `reviews=0.7,tweets=0.3`."
        )
    used = {name: weight for name, weight in weights.items() if weight}
    return Target(model, base, used, tuple(weights))


def _labels(versions: Iterable[Version]) -> tuple[str, ...]:
    """The names of classes that all of them have; none where they differ."""
    found = {version.labels for version in versions}
    return found.pop() if len(found) == 1 else ()


def resolve(target: Target, lease: Lease, base_fingerprint: str) -> Resolved:
    """The entry for the engine, by the versions that were leased."""
    by_name: Mapping[str, Version] = {version.name: version for version in lease.versions}
    weights = {by_name[name]: weight for name, weight in target.weights.items()}
    if not weights:
        return Resolved(None, "", base_fingerprint)
    if list(weights.values()) == [1.0]:
        [version] = weights
        labels = version.labels
        return Resolved(version.hosted, identity(weights), version.fingerprint, labels)
    told = "+".join(f"{version.fingerprint}*{weight:g}" for version, weight in weights.items())
    entry = {version.hosted: weight for version, weight in weights.items()}
    return Resolved(entry, identity(weights), told, _labels(weights))
