"""Planted spectra and planted intruders: all are found, and no others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from loralab.errors import AdapterError
from loralab.lowrank import (
    Dense,
    Factors,
    dense_svd,
    factored_svd,
    intruder_onset,
    intrusion,
    overlap_table,
    random_overlap,
    random_overlap_std,
)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def weight(out: int, into: int, seed: int, *, decay: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(out, into, generator=generator)
    if not decay:
        return gaussian
    U, _, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    return U * (8 * torch.arange(1, min(out, into) + 1) ** -0.4) @ Vh


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 100))
def test_dense_svd_is_the_svd(out: int, into: int, seed: int) -> None:
    matrix = weight(out, into, seed, decay=False)
    found, expected = dense_svd(matrix), np.linalg.svd(matrix.double().numpy())[1]
    np.testing.assert_allclose(found.S, expected, rtol=1e-5, atol=1e-6 * expected[0])
    torch.testing.assert_close(found.U * found.S @ found.Vh, matrix, rtol=0, atol=1e-4)
    torch.testing.assert_close(Dense(matrix).values, found.S, rtol=1e-5, atol=1e-5)
    part = dense_svd(matrix, 3)
    np.testing.assert_allclose(part.S, expected[:3], rtol=1e-5, atol=1e-6 * expected[0])


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("num_planted", [0, 1, 3])
def test_all_planted_intruders_are_found_and_no_others(
    shape: tuple[int, int], decay: bool, num_planted: int
) -> None:
    for seed in range(4):
        base = weight(*shape, seed, decay=decay)
        svd = dense_svd(base)
        generator = torch.Generator().manual_seed(100 + seed)
        # the delta also strengthens three directions that the base has, and adds little noise
        known = [2, 5, 7]
        noise = orthonormal(shape[0], 4, generator), orthonormal(shape[1], 4, generator)
        new_out = orthonormal(shape[0], max(1, num_planted), generator)[:, :num_planted]
        new_in = orthonormal(shape[1], max(1, num_planted), generator)[:, :num_planted]
        B = torch.cat([svd.U[:, known], new_out, noise[0]], dim=1)
        sizes = torch.tensor([0.5, 0.4, 0.3] + [2.0] * num_planted + [0.01] * 4) * svd.S[0]
        A = torch.cat([svd.Vh[known], new_in.mT, noise[1].mT]) * sizes[:, None]
        pair = Factors(A=A, B=B)
        found = intrusion(Dense(base), base + B @ A, factored_svd(pair).U)
        assert int(found.intruders.sum()) == num_planted
        assert found.intruders[:num_planted].all()  # they are the strongest


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
def test_the_onset_is_within_a_factor_of_two_of_planted_directions(shape: tuple[int, int]) -> None:
    base = weight(*shape, 0, decay=False)
    svd = dense_svd(base)
    onset = intruder_onset(svd.S, shape)
    generator = torch.Generator().manual_seed(1)
    found = {0.5: 0, 2.0: 0}
    for _ in range(6):
        u, v = (orthonormal(size, 1, generator) for size in shape)
        for factor in found:
            seen = intrusion(Dense(base), base + factor * onset * u @ v.mT, u)
            found[factor] += int(seen.intruders.sum())
    assert found == {0.5: 0, 2.0: 6}


def test_a_weight_without_values_has_no_onset() -> None:
    assert intruder_onset(torch.zeros(4), (4, 4)) == 0.0


def test_numbers_that_are_none_are_named() -> None:
    with pytest.raises(AdapterError, match="NaN or Inf"):
        dense_svd(torch.full((3, 3), torch.nan))


def test_random_subspaces_overlap_as_said() -> None:
    generator = torch.Generator().manual_seed(0)
    features, i, j = 40, 3, 8
    seen = []
    for _ in range(400):
        first, second = (
            Factors(
                A=torch.randn(rank, features, generator=generator),
                B=torch.randn(30, rank, generator=generator),
            )
            for rank in (i, j)
        )
        seen.append(float(overlap_table(first, second)[i - 1, j - 1]))
    assert np.mean(seen) == pytest.approx(random_overlap(i, j, features), rel=0.05)
    assert np.std(seen) == pytest.approx(random_overlap_std(i, j, features), rel=0.15)
