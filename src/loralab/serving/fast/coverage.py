"""Which adapters the decoding step covers, and their factors block by block."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard, cast

from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import Adapter, Pair, hosted_items, walk
from loralab.serving.fast.decoder import Decoder


class Factors(NamedTuple):
    """One projection's pair: `scale * B (A x)`."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float | int


Table = list[list[Factors | None]]
"""By block and projection; None where the adapter leaves the projection as it is."""


Hosts = list[tuple[str, nn.Module, Mapping[str, Any]]]
"""Every module that hosts adapters: its path, itself, adapter -> what it hosts of it."""


class Sites:
    """Where the decoder's projections are among all modules that host adapters."""

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        self._modules = list(walk(model))
        self._size = len(decoder.blocks), len(decoder.blocks[0].projections)
        self._places = {
            projection.module: (number, index)
            for number, block in enumerate(decoder.blocks)
            for index, projection in enumerate(block.projections)
        }
        self._places_by_path = {
            path: self._places[module] for path, module in self._modules if module in self._places
        }

    def hosts(self) -> Hosts:
        """All modules that host adapters now, with what each hosts."""
        return hosted_items(self._modules)

    def factors(self, hosts: Hosts, name: str) -> Table | str:
        """The hosted adapter's factors, or the reason why the step does not cover it."""
        table = self._empty_table()
        for path, module, items in hosts:
            if name not in items:
                continue
            place, item = self._places.get(module), items[name]
            if place is None or not _is_plain(item):
                return f"what it changes at {path!r} is more than a pair on a block's projection"
            table[place[0]][place[1]] = _factors(item)
        return table

    def factors_of(self, adapter: Adapter) -> Table | None:
        """The factors of an adapter that is to be hosted; None where the step may not cover it."""
        if adapter.extra or adapter.magnitudes or adapter.token_rows:
            return None
        table = self._empty_table()
        for path, (A, B) in adapter.pairs.items():
            if path not in self._places_by_path:
                return None
            number, index = self._places_by_path[path]
            table[number][index] = Factors(A, B, adapter.scale(path))
        return table

    def _empty_table(self) -> Table:
        num_blocks, num_projections = self._size
        return [[None] * num_projections for _ in range(num_blocks)]


# Straight from the tables of parameters: hundreds of pairs are looked at when an adapter is loaded.


def _is_plain(item: Any) -> TypeGuard[Pair]:
    """Whether the item adds `scale * B (A x)` and nothing else."""
    if not isinstance(item, Pair):
        return False
    return item._parameters["magnitude"] is None and item._parameters["bias"] is None


def _factors(pair: Pair) -> Factors:
    if pair._buffers["first_A"] is not None:  # on a base that was moved: the rank doubles
        A, B = pair.factors()
    else:
        A, B = cast(Tensor, pair._parameters["A"]), cast(Tensor, pair._parameters["B"])
    return Factors(A.detach(), B.detach(), pair.scale)


def _tensors(item: nn.Module) -> list[Tensor]:
    if isinstance(item, Pair):
        return [tensor for tensor in item._parameters.values() if tensor is not None]
    return list(item.parameters())


class Version:
    """What an adapter was when it was made ready: the same items with the same values?"""

    def __init__(self, hosts: Hosts, name: str) -> None:
        self._items = [items.get(name) for _, _, items in hosts]
        self._tensors = [
            tensor
            for item in self._items
            if item is not None
            for tensor in (
                item._parameters.values() if isinstance(item, Pair) else item.parameters()
            )
            if tensor is not None
        ]
        self._written = [tensor._version for tensor in self._tensors]

    def holds(self, hosts: Hosts, name: str) -> bool:
        """Whether nothing was replaced or written since."""
        now = [items.get(name) for _, _, items in hosts]
        return (
            len(now) == len(self._items)
            and all(map(operator.is_, now, self._items))
            and [tensor._version for tensor in self._tensors] == self._written
        )
