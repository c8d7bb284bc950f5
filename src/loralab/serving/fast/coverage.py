"""Which adapters the decoding step covers, and their factors block by block."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import adapted_modules, member_of
from loralab.serving.fast.decoder import Decoder


class Factors(NamedTuple):
    """One projection's pair: `scale * B (A x)`."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float | int


Table = list[list[Factors | None]]
"""By block and projection; None where the adapter leaves the projection as it is."""


class Sites:
    """Where the decoder's projections are among all modules that host adapters."""

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        self._model = model
        self._size = len(decoder.blocks), len(decoder.blocks[0].projections)
        self._places = {
            projection.module: (number, index)
            for number, block in enumerate(decoder.blocks)
            for index, projection in enumerate(block.projections)
        }

    def hosts(self) -> list[tuple[str, nn.Module]]:
        """All modules that host adapters now."""
        return list(adapted_modules(self._model))

    def factors(self, hosts: Sequence[tuple[str, nn.Module]], name: str) -> Table | str:
        """The adapter's factors, or the reason why the step does not cover it."""
        num_blocks, num_projections = self._size
        table: Table = [[None] * num_projections for _ in range(num_blocks)]
        for path, module in hosts:
            if name not in module.adapters._modules:
                continue
            place = self._places.get(module)
            member = member_of(module, ((name, 1.0),)) if place is not None else None
            if place is None or member is None or not member.uses:
                return f"what it changes at {path!r} is more than a pair on a block's projection"
            (used,) = member.uses
            A, B = used.pair.factors()
            table[place[0]][place[1]] = Factors(A.detach(), B.detach(), used.scale)
        return table


def signature(table: Table) -> tuple[object, ...]:
    """Differs where the tensors, what was written to them, or their scales do."""
    return tuple(
        None
        if each is None
        else (
            each.A.data_ptr(),
            each.A._version,
            each.B.data_ptr(),
            each.B._version,
            each.scale,
        )
        for block in table
        for each in block
    )
