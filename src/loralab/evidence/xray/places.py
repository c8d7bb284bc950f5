"""Where a module stands: which repeated block it is in, and what it is there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """block: the number of the repeated block, None outside of them; kind: the rest of its name."""

    block: int | None
    kind: str


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Each module with its place, in the order of the blocks.

    `model.layers.10.self_attn.q_proj` is `self_attn.q_proj` in block 10. Where names hold several
    numbers (`encoder.layers.0.blocks.1.mlp`), blocks are counted through.
    """
    numbers = {module: _numbers(module) for module in modules}
    several = any(len(found) > 1 for found in numbers.values())
    order = {found: i for i, found in enumerate(sorted({n for n in numbers.values() if n}))}
    found = {}
    for module in sorted(numbers, key=lambda name: (numbers[name], name)):
        own = numbers[module]
        block = (order[own] if several else own[0]) if own else None
        found[module] = Place(block, _kind(module) if own else module)
    return found


def _numbers(module: str) -> tuple[int, ...]:
    return tuple(int(part) for part in module.split(".") if part.isdigit())


def _kind(module: str) -> str:
    """What follows the first number, without further numbers; the whole name for nothing."""
    rest = re.split(r"\.\d+\.", module, maxsplit=1)[-1]
    return ".".join(part for part in rest.split(".") if not part.isdigit()) or module
