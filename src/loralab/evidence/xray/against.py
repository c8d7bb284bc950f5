"""What two adapters share: the overlap of their deltas' directions, beside that of chance.

Hu et al. 2021, figures 3 and 4 (ranks, seeds), on the singular vectors of the deltas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.adapters import Adapter
from loralab.errors import AdapterError
from loralab.evidence.xray.places import Place, places
from loralab.lowrank import (
    SVD,
    Factors,
    factored_svd,
    inner_product,
    random_overlap,
    random_overlap_std,
    subspace_overlap,
)

MAX_DIRECTIONS = 64  # of each adapter in the tables
CHANCE = 3.0  # standard deviations above the overlap of random subspaces


@dataclass(frozen=True)
class SideOverlap:
    """Overlap on the inputs or the outputs of one module.

    first: phi(1, 1); shared: phi(k, k) for the k directions that both deltas have.
    expected, std: of `shared` for random subspaces; above_chance: it is three of them above.
    """

    first: float
    shared: float
    expected: float
    std: float
    above_chance: bool


@dataclass(frozen=True)
class ModuleOverlap:
    """What two deltas of one module share. cosine: of the deltas as vectors."""

    module: str
    block: int | None
    kind: str
    num_directions: int
    cosine: float
    inputs: SideOverlap
    outputs: SideOverlap


@dataclass(frozen=True)
class Overlap:
    """What two adapters share. Tables hold the mean of phi(i, j) over modules at [i - 1][j - 1].

    cosine: of the two whole deltas. only_first, only_second: modules that just one adapts.
    """

    name: str
    cosine: float
    modules: tuple[ModuleOverlap, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    inputs: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]


def overlap_with(
    name: str,
    adapter: Adapter,
    svds: Mapping[str, SVD],
    other: Adapter,
    factors: Callable[[Adapter, str], Factors],
) -> Overlap:
    """Compares every module that both adapt. Raises `AdapterError` where there is none."""
    common = [module for module in svds if module in other.pairs]
    if not common:
        raise AdapterError(
            f"{name} adapts none of the same modules", "compare adapters of the same base model."
        )
    where = places(common)
    found, tables = [], {"inputs": _Mean(), "outputs": _Mean()}
    inner = first_square = second_square = 0.0
    for module in where:
        first, second = svds[module], factored_svd(factors(other, module))
        if (len(first.U), first.Vh.shape[1]) != (len(second.U), second.Vh.shape[1]):
            raise AdapterError(
                f"{module} has another shape in {name}", "compare adapters of the same base model."
            )
        product = inner_product(factors(adapter, module), factors(other, module))
        inner += product
        first_square += float(first.S.double().square().sum())
        second_square += float(second.S.double().square().sum())
        found.append(_module(module, where[module], first, second, product, tables))
    scale = (first_square * second_square) ** 0.5
    return Overlap(
        name=name,
        cosine=inner / scale if scale > 0 else 0.0,
        modules=tuple(found),
        only_first=tuple(module for module in svds if module not in other.pairs),
        only_second=tuple(module for module in other.pairs if module not in svds),
        inputs=tables["inputs"].rows(),
        outputs=tables["outputs"].rows(),
    )


def _module(
    module: str,
    place: Place,
    first: SVD,
    second: SVD,
    product: float,
    tables: Mapping[str, "_Mean"],
) -> ModuleOverlap:
    one, two = first.numerical_rank, second.numerical_rank
    sides = {}
    for side, (a, b) in {
        "inputs": (first.Vh[:one], second.Vh[:two]),
        "outputs": (first.U[:, :one].mT, second.U[:, :two].mT),
    }.items():
        table = subspace_overlap(a[:MAX_DIRECTIONS], b[:MAX_DIRECTIONS])
        tables[side].add(table)
        sides[side] = _side(table, a.shape[1])
    norms = float(torch.linalg.vector_norm(first.S) * torch.linalg.vector_norm(second.S))
    return ModuleOverlap(
        module=module,
        block=place.block,
        kind=place.kind,
        num_directions=min(one, two, MAX_DIRECTIONS),
        cosine=product / norms if norms > 0 else 0.0,
        **sides,
    )


def _side(table: Float[Tensor, "first second"], features: int) -> SideOverlap:
    both = min(table.shape)
    if both == 0:  # one of the deltas is zero
        return SideOverlap(0.0, 0.0, 0.0, 0.0, False)
    shared = float(table[both - 1, both - 1])
    expected = random_overlap(both, both, features)
    std = random_overlap_std(both, both, features)
    above = shared > expected + CHANCE * std + 1e-6
    return SideOverlap(float(table[0, 0]), shared, expected, std, above)


class _Mean:
    """The mean of tables of different sizes, entry by entry."""

    def __init__(self) -> None:
        self._sum = torch.zeros(MAX_DIRECTIONS, MAX_DIRECTIONS, dtype=torch.float64)
        self._count = torch.zeros(MAX_DIRECTIONS, MAX_DIRECTIONS, dtype=torch.int64)

    def add(self, table: Float[Tensor, "first second"]) -> None:
        rows, columns = table.shape
        self._sum[:rows, :columns] += table
        self._count[:rows, :columns] += 1

    def rows(self) -> tuple[tuple[float, ...], ...]:
        rows = int((self._count[:, 0] > 0).sum())
        columns = int((self._count[0] > 0).sum())
        mean = self._sum[:rows, :columns] / self._count[:rows, :columns].clamp_min(1)
        return tuple(tuple(row) for row in mean.tolist())
