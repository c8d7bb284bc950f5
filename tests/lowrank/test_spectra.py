"""Everything about a delta that its factors tell, against dense torch.linalg in fp64."""

import math
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from loralab.errors import AdapterError
from loralab.lowrank import (
    Factors,
    amplification,
    cosine,
    delta,
    delta_rows,
    effective_rank,
    energy,
    factored_svd,
    frobenius_norm,
    inner_product,
    overlap,
    overlap_table,
    random_overlap,
    singular_values,
    stable_rank,
    truncate,
)

from .strategies import dense, pairs, random_pair, tolerance

laws = settings(max_examples=60, deadline=None)


@laws
@given(pairs(count=1))
def test_the_factored_svd_is_the_svd_of_the_delta(drawn):
    (pair,) = drawn
    svd = factored_svd(pair)
    expected = torch.linalg.svdvals(dense(pair))[: len(svd.S)]
    close = tolerance(pair)
    assert torch.allclose(svd.S.double(), expected, rtol=0, atol=close)
    assert torch.allclose(singular_values(pair).double(), expected, rtol=0, atol=close)
    rebuilt = svd.U.double() @ svd.S.double().diag() @ svd.Vh.double()
    assert torch.allclose(rebuilt, dense(pair), rtol=0, atol=close)
    eye = torch.eye(len(svd.S), dtype=torch.float64)
    assert torch.allclose(svd.U.double().mT @ svd.U.double(), eye, atol=1e-5)
    assert torch.allclose(svd.Vh.double() @ svd.Vh.double().mT, eye, atol=1e-5)


@laws
@given(pairs(count=2))
def test_norm_inner_product_and_rows_agree_with_the_dense_delta(drawn):
    one, two = drawn
    assert frobenius_norm(one) == pytest.approx(float(dense(one).norm()), abs=tolerance(one))
    close = tolerance(one) * float(dense(two).norm()) + tolerance(two) * float(dense(one).norm())
    expected = float((dense(one) * dense(two)).sum())
    assert inner_product(one, two) == pytest.approx(expected, rel=1e-9, abs=close + 1e-30)
    assert cosine(one, one) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(delta(one).double(), dense(one), rtol=0, atol=tolerance(one))
    middle = one.shape[0] // 2
    rows = torch.cat([delta_rows(one, 0, middle), delta_rows(one, middle, one.shape[0])])
    assert torch.allclose(rows.double(), dense(one), rtol=0, atol=tolerance(one))


@laws
@given(pairs(count=1), st.integers(1, 10))
def test_truncation_reaches_the_svd_bound_and_states_it(drawn, rank):
    (pair,) = drawn
    matrix = dense(pair)
    bound = float(torch.linalg.svdvals(matrix)[rank:].norm())
    cut = truncate(pair, rank=rank)
    reached = float((dense(cut.factors) - matrix).norm())
    close = tolerance(pair)
    assert cut.factors.rank <= rank or cut.factors is pair
    assert reached == pytest.approx(bound, abs=close)
    assert cut.error == pytest.approx(bound, abs=close)
    assert cut.relative_error * float(matrix.norm()) == pytest.approx(bound, abs=close)


@laws
@given(pairs(count=1, dtypes=(torch.float64,)), st.floats(0.05, 1.0))
def test_truncation_to_an_energy_takes_the_least_rank_that_holds_it(drawn, share):
    (pair,) = drawn
    squares = torch.linalg.svdvals(dense(pair)) ** 2
    cut = truncate(pair, energy=share)
    held = squares.cumsum(0) / squares.sum()
    assert held[cut.factors.rank - 1 if cut.factors is not pair else -1] >= share - 1e-9
    if cut.factors is not pair and cut.factors.rank > 1:
        assert held[cut.factors.rank - 2] < share
    assert cut.relative_error**2 <= 1 - share + 1e-9


def test_energy_one_drops_only_rounding_error():
    pair = random_pair(30, 20, 3)
    twice = Factors(A=torch.cat([pair.A, pair.A]), B=torch.cat([pair.B, pair.B], 1))
    cut = truncate(twice, energy=1.0)
    assert cut.factors.rank == 3
    assert torch.allclose(dense(cut.factors), dense(twice))


def test_factors_small_enough_come_back_untouched():
    pair = random_pair(30, 20, 3)
    assert truncate(pair, rank=3).factors is pair
    assert truncate(pair, rank=8).error == 0


def test_a_zero_delta_has_a_spectrum_without_nan():
    zero = Factors(A=torch.randn(4, 6), B=torch.zeros(5, 4))
    values = singular_values(zero)
    assert energy(values).tolist() == [1.0] * 4
    assert stable_rank(values) == effective_rank(values) == cosine(zero, zero) == 0
    cut = truncate(zero, rank=2)
    assert (cut.error, cut.relative_error) == (0, 0)
    assert truncate(zero, energy=0.5).factors.rank == 1


def test_ranks_of_known_spectra():
    equal = torch.ones(8)
    assert stable_rank(equal) == pytest.approx(8)
    assert effective_rank(equal) == pytest.approx(8)
    one = torch.tensor([3.0, 0.0, 0.0])
    assert stable_rank(one) == pytest.approx(1)
    assert effective_rank(one) == pytest.approx(1)
    assert energy(torch.tensor([2.0, 1.0, 1.0])).tolist() == pytest.approx([4 / 6, 5 / 6, 1])


@laws
@given(
    pairs(count=1, dtypes=(torch.float64,)), st.integers(0, 2**16), st.sampled_from(["in", "out"])
)
def test_overlap_does_not_see_how_a_delta_is_factored(drawn, seed, side):
    (pair,) = drawn
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(
        torch.randn(pair.rank, pair.rank, generator=generator, dtype=torch.float64)
    ).Q * torch.linspace(1, 3, pair.rank, dtype=torch.float64)
    other = Factors(A=torch.linalg.solve(mixing, pair.A), B=pair.B @ mixing, scale=pair.scale)
    table = overlap_table(pair, other, side)
    assert torch.allclose(table.diag(), torch.ones(len(table), dtype=torch.float64), atol=1e-5)


def test_overlap_is_the_dense_formula_and_its_null_holds():
    one, two = random_pair(300, 200, 8, seed=1), random_pair(300, 200, 16, seed=2)
    (U1, _, V1), (U2, _, V2) = torch.linalg.svd(dense(one)), torch.linalg.svd(dense(two))
    for i, j in ((1, 1), (4, 16), (8, 3)):
        by_inputs = float((V1[:i] @ V2[:j].mT).norm() ** 2) / min(i, j)
        by_outputs = float((U1[:, :i].mT @ U2[:, :j]).norm() ** 2) / min(i, j)
        assert overlap(one, two, i, j) == pytest.approx(by_inputs)
        assert overlap(one, two, i, j, side="out") == pytest.approx(by_outputs)
    found = [
        overlap(random_pair(300, 200, 8, seed=s), random_pair(300, 200, 16, seed=s + 99), 8, 16)
        for s in range(20)
    ]
    assert sum(found) / 20 == pytest.approx(random_overlap(8, 16, 200), rel=0.1)


def test_overlap_refuses_directions_that_are_not_there():
    with pytest.raises(
        AdapterError, match=r"overlap of 5 and 1 directions: the deltas have 4 and 4"
    ):
        overlap(random_pair(9, 9, 4), random_pair(9, 9, 4), 5, 1)
    with pytest.raises(AdapterError, match=r"9 and 7 features on side 'in'"):
        overlap_table(random_pair(9, 9, 4), random_pair(9, 7, 4))


def test_amplification_of_a_planted_direction():
    weight = torch.eye(16, dtype=torch.float64) * 0.25
    direction = torch.zeros(16, 1, dtype=torch.float64)
    direction[3] = 1
    pair = Factors(A=direction.mT, B=5 * direction)
    assert amplification(pair, weight) == pytest.approx(20)


def test_nan_in_factors_is_named():
    pair = Factors(A=torch.full((2, 4), math.nan), B=torch.ones(3, 2))
    for function in (factored_svd, singular_values, frobenius_norm):
        with pytest.raises(AdapterError, match="NaN or Inf"):
            function(pair)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 2, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank 0 is no rank"),
        ({"energy": 1.5}, "energy 1.5 is no share"),
    ],
)
def test_truncation_says_what_it_needs(size, words):
    with pytest.raises(AdapterError, match=words):
        truncate(random_pair(4, 4, 2), **size)


def test_svd_of_a_large_delta_is_a_matter_of_milliseconds():
    pair = random_pair(8192, 2048, 16, dtype=torch.float32)
    factored_svd(pair)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        factored_svd(pair)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.010
