"""One threshold over many spectra, against sorting all values."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from loralab.errors import AdapterError
from loralab.lowrank import ranks_within


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(2, 9)), min_size=1, max_size=5),
    extra=st.integers(0, 60),
    seed=st.integers(0, 2**16),
)
def test_directions_enter_by_their_values_until_one_does_not_fit(
    sizes: list[tuple[int, int]], extra: int, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    values = {f"m{i}": np.sort(chance.random(n))[::-1] for i, (n, _) in enumerate(sizes)}
    costs = {f"m{i}": cost for i, (_, cost) in enumerate(sizes)}
    budget = sum(costs.values()) + extra
    spectra = {name: torch.from_numpy(found.copy()) for name, found in values.items()}
    ranks = ranks_within(spectra, costs, budget)
    expected, spent = dict.fromkeys(values, 1), sum(costs.values())
    rest = [(value, name) for name, own in values.items() for value in own[1:]]
    for _, name in sorted(rest, reverse=True):
        spent += costs[name]
        if spent > budget:
            break
        expected[name] += 1
    assert ranks == expected
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget


def test_a_budget_below_one_direction_each_is_refused() -> None:
    with pytest.raises(AdapterError, match="one direction for each of 2 modules takes 8 numbers"):
        ranks_within({"a": torch.ones(2), "b": torch.ones(2)}, {"a": 4, "b": 4}, 7)
