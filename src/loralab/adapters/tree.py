"""`targets(model)`: the model's modules and what an adapter on each would cost."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from loralab.adapters.layers import is_linear, path_of
from loralab.adapters.targets import output_head, walk


@dataclass(frozen=True)
class Choice:
    """One kind of module that can be targeted, over all the places it occurs in.

    name: what to write into `targets`; shape: (out, in) of its delta.
    cost: parameters of a pair a unit of rank, over all places: `num_modules * (out + in)`.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    num_modules: int
    all_linear: bool

    @property
    def cost(self) -> int:
        return self.num_modules * sum(self.shape)


@dataclass(frozen=True)
class Tree:
    """What can be targeted; printed as a table, an iterable of `Choice`."""

    choices: tuple[Choice, ...]
    rank: int

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    @property
    def all_linear_parameters(self) -> int:
        """What "all-linear" costs at that rank."""
        return self.rank * sum(choice.cost for choice in self.choices if choice.all_linear)

    def __str__(self) -> str:
        head = ("target", "kind", "places", "out x in", f"parameters at rank {self.rank}", "")
        rows = [
            (
                choice.name,
                choice.kind,
                str(choice.num_modules),
                f"{choice.shape[0]} x {choice.shape[1]}",
                f"{self.rank * choice.cost:,}",
                "in all-linear" if choice.all_linear else "",
            )
            for choice in self.choices
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join([*lines, f"all-linear: {self.all_linear_parameters:,} parameters"])


def targets(model: nn.Module, rank: int = 16) -> Tree:
    """The modules that an adapter can be on, grouped by the last part of their name and shape."""
    heads = output_head(model)
    groups: dict[tuple[str, str, tuple[int, int], bool], int] = {}
    for name, module in walk(model):
        path = path_of(module)
        if path is None or not name:
            continue
        in_head = any(name == head or name.startswith(head + ".") for head in heads)
        last = name.rpartition(".")[2]
        written = name if last.isdigit() else last
        key = (
            written,
            module._get_name(),
            path.features(module),
            is_linear(module) and not in_head,
        )
        groups[key] = groups.get(key, 0) + 1
    return Tree(tuple(Choice(*key[:3], count, key[3]) for key, count in groups.items()), rank)
