"""Which directions of many deltas to keep: one threshold on the singular values of all of them."""

import heapq
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from loralab.errors import AdapterError


def ranks_within(
    values: Mapping[str, Float[Tensor, "_kept"]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The rank of each delta when one threshold cuts the singular values of all, within a budget.

    values: of each delta, falling. costs: numbers that one direction of it takes, `in + out`.
    budget: of numbers in all. Directions enter in the order of their singular values, whichever
    delta they belong to, until one does not fit, so the smallest kept value is the threshold: no
    other choice of as many directions has a smaller error over all deltas together. Each delta
    keeps one direction at least, so that the adapter stays on the same modules.

    Raises `AdapterError` where one direction each is over the budget.
    """
    ranks = {name: 1 for name, kept in values.items() if len(kept)}
    spent = sum(costs[name] for name in ranks)
    if spent > budget:
        raise AdapterError(
            f"one direction for each of {len(ranks)} modules takes {spent} numbers, over {budget}",
            "give a larger budget.",
        )
    waiting = [(-float(values[name][1]), name) for name in ranks if len(values[name]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        spent += costs[name]
        if spent > budget:
            break
        ranks[name] += 1
        if ranks[name] < len(values[name]):
            heapq.heappush(waiting, (-float(values[name][ranks[name]]), name))
    return ranks
