"""Sums of deltas through factors, against the same done on dense matrices."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft.utils import merge_utils
from torch.utils._python_dispatch import TorchDispatchMode

from loralab.errors import AdapterError
from loralab.lowrank import (
    Factors,
    RowStream,
    add,
    approximate,
    dare,
    knots,
    linear,
    scaled,
    subtract,
    ties,
    truncate,
)
from loralab.lowrank.streaming import kth_largest_magnitude

from .strategies import dense, pairs, random_pair, tolerance

laws = settings(max_examples=60, deadline=None)
weights_of = st.floats(-3, 3, allow_nan=False)


def stream_of(matrix: torch.Tensor) -> RowStream:
    return RowStream((matrix.shape[0], matrix.shape[1]), lambda start, stop: matrix[start:stop])


@laws
@given(st.data())
def test_linear_is_the_weighted_sum_of_the_deltas(data):
    terms = data.draw(pairs())
    weights = [data.draw(weights_of) for _ in terms]
    expected = sum(w * dense(t) for w, t in zip(weights, terms, strict=True))
    result = linear(terms, weights)
    assert result.rank <= sum(t.rank for t in terms)
    assert torch.allclose(dense(result), expected, rtol=0, atol=3 * tolerance(*terms))


@laws
@given(pairs(count=1))
def test_one_at_weight_one_is_itself(drawn):
    assert linear(drawn, [1.0]) is drawn[0]
    assert scaled(drawn[0], 1.0) is drawn[0]


@laws
@given(pairs(count=1))
def test_a_minus_a_is_exactly_zero(drawn):
    (pair,) = drawn
    assert not dense(subtract(pair, pair)).any()
    copy = Factors(A=pair.A.clone(), B=pair.B.clone(), scale=pair.scale)
    assert not dense(linear([pair, copy, pair, copy], [0.3, 0.5, -0.3, -0.5])).any()


@laws
@given(pairs(count=2))
def test_add_and_subtract_undo_each_other(drawn):
    one, two = drawn
    back = subtract(add(one, two), two)
    assert torch.allclose(dense(back), dense(one), rtol=0, atol=3 * tolerance(one, two))


def test_equal_scales_stay_outside_and_signs_are_exact():
    one, two = random_pair(6, 5, 2, seed=1, scale=0.3), random_pair(6, 5, 3, seed=2, scale=0.3)
    result = subtract(one, two)
    assert result.scale == 0.3
    assert torch.equal(result.B, torch.cat([one.B, -two.B], 1))


@laws
@given(pairs(count=3), st.integers(1, 6))
def test_recompressed_sum_is_the_best_of_its_rank(terms, rank):
    weights = [0.7, 0.3, -0.5]
    matrix = sum(w * dense(t) for w, t in zip(weights, terms, strict=True))
    cut = truncate(linear(terms, weights), rank=rank)
    bound = float(torch.linalg.svdvals(matrix)[rank:].norm())
    close = 3 * tolerance(*terms)
    assert cut.error == pytest.approx(bound, abs=close)
    assert float((dense(cut.factors) - matrix).norm()) == pytest.approx(bound, abs=close)


def elements_of(matrices, weights, density):
    stacked = [m.float() for m in matrices]
    return merge_utils.ties(stacked, torch.tensor(weights), density)


@laws
@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 99), st.floats(0.1, 0.95))
def test_ties_at_full_rank_is_ties_of_the_dense_deltas(out, into, seed, density):
    terms = [random_pair(out, into, 2 + k, seed=seed + 100 * k, scale=0.5) for k in range(3)]
    weights = [0.7, 0.3, 1.1]
    expected = elements_of([dense(t) for t in terms], weights, density)
    merged = ties(terms, weights, density=density, rank=min(out, into))
    assert torch.allclose(dense(merged.factors).float(), expected, atol=1e-4)
    assert merged.relative_error < 1e-4


def test_ties_to_a_rank_states_its_error_and_is_near_the_best():
    terms = [random_pair(60, 50, 4, seed=k) for k in range(3)]
    matrix = elements_of([dense(t) for t in terms], [1.0, 1.0, 1.0], 0.3).double()
    merged = ties(terms, [1.0, 1.0, 1.0], density=0.3, rank=8)
    best = float(torch.linalg.svdvals(matrix)[8:].norm())
    assert merged.factors.rank == 8
    assert merged.error == pytest.approx(float((dense(merged.factors) - matrix).norm()), rel=1e-4)
    assert best <= merged.error * (1 + 1e-6) <= best * 1.01


def test_ties_to_an_energy_holds_that_share():
    terms = [random_pair(60, 50, 4, seed=k) for k in range(2)]
    merged = ties(terms, [1.0, 1.0], density=0.5, energy=0.9)
    assert merged.relative_error**2 <= 0.1 + 1e-6
    assert merged.factors.rank < 50


def test_ties_elects_against_a_subtracted_delta():
    """A negative weight turns the delta round before the election, so a - a stays nothing odd."""
    pair = random_pair(12, 10, 3)
    turned = ties([pair], [-1.0], density=1.0, rank=10)
    assert torch.allclose(dense(turned.factors), -dense(pair), atol=1e-6)


@pytest.mark.parametrize("consensus", ["sum", "sign"])
def test_dare_at_density_one_is_the_sum_or_ties(consensus):
    terms = [random_pair(20, 15, 3, seed=k) for k in range(2)]
    merged = dare(terms, [0.5, 2.0], density=1.0, consensus=consensus, rank=15)
    if consensus == "sum":
        expected = 0.5 * dense(terms[0]) + 2 * dense(terms[1])
    else:
        expected = dense(ties(terms, [0.5, 2.0], density=1.0, rank=15).factors)
    assert torch.allclose(dense(merged.factors), expected, atol=1e-5)


def test_dare_drops_the_share_it_says_and_keeps_the_mean():
    pair = random_pair(40, 30, 2)
    total = torch.zeros(40, 30, dtype=torch.float64)
    for seed in range(200):
        one = dense(dare([pair], [1.0], density=0.25, rank=30, seed=seed).factors)
        total += one
        if seed == 0:
            kept = one.abs() > 1e-6
            assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.05)
            assert torch.allclose(one[kept], 4 * dense(pair)[kept], atol=1e-5)
    # the mean of 200 draws: standard error sqrt((1 - p) / p / 200) = 0.12 of an element
    assert float((total / 200 - dense(pair)).norm() / dense(pair).norm()) < 0.15
    again = [dare([pair], [1.0], density=0.25, rank=3, seed=7).factors.A for _ in range(2)]
    assert torch.equal(*again)


@laws
@given(st.data())
def test_knots_without_pruning_and_voting_is_linear(data):
    terms = data.draw(pairs())
    weights = [data.draw(weights_of) for _ in terms]
    expected = sum(w * dense(t) for w, t in zip(weights, terms, strict=True))
    result = knots(terms, weights, density=1.0, consensus="sum")
    assert torch.allclose(dense(result), expected, rtol=0, atol=10 * tolerance(*terms))


def test_knots_is_ties_in_the_basis_of_the_stacked_deltas():
    terms = [random_pair(20, 15, 3, seed=k) for k in range(3)]
    weights = [1.0, 0.5, 0.25]
    U, S, Vh = torch.linalg.svd(torch.cat([dense(t) for t in terms], 1), full_matrices=False)
    U, S, Vh = U[:, :9], S[:9], Vh[:9]
    merged = merge_utils.ties(list(Vh.split(15, 1)), torch.tensor(weights), density=0.4)
    result = knots(terms, weights, density=0.4)
    assert result.rank == 9
    assert torch.allclose(dense(result), U * S @ merged.double(), atol=1e-6)


@laws
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.data())
def test_the_kth_largest_magnitude_is_exact(rows, columns, seed, data):
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    matrix = torch.randn(rows, columns, generator=generator, dtype=dtype)
    matrix[torch.rand(rows, columns, generator=generator) < 0.2] = 0.5  # ties
    k = data.draw(st.integers(1, rows * columns))
    expected = float(matrix.abs().flatten().sort(descending=True).values[k - 1])
    assert kth_largest_magnitude(stream_of(matrix), k) == expected


def test_a_streamed_matrix_of_low_rank_is_found_exactly():
    pair = random_pair(50, 40, 5)
    found = approximate(stream_of(dense(pair)), energy=1.0)
    assert found.factors.rank == 5
    assert found.relative_error < 1e-10


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside it has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        sizes = [tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return result


@pytest.mark.parametrize(
    "merge",
    [
        lambda terms: linear(terms, [0.5, 0.5]),
        lambda terms: truncate(linear(terms, [0.5, 0.5]), rank=4),
        lambda terms: truncate(linear(terms, [0.5, 0.5]), energy=0.9),
        lambda terms: knots(terms, [0.5, 0.5], density=0.5),
        lambda terms: ties(terms, [0.5, 0.5], density=0.5, rank=4),
        lambda terms: dare(terms, [0.5, 0.5], density=0.5, rank=4),
    ],
)
def test_no_whole_delta_is_ever_made(merge):
    """Elementwise merges see blocks of rows: here 1024 of 3000 (two at a time, stacked)."""
    terms = [random_pair(3000, 1024, 4, seed=k, dtype=torch.float32) for k in range(2)]
    with LargestTensor() as watch:
        merge(terms)
    assert watch.most < 3000 * 1024


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear([random_pair(4, 4, 2)], [1.0, 2.0]), "1 deltas but 2 weights"),
        (lambda: linear([], []), "one and the same shape are needed, found: none"),
        (lambda: add(random_pair(4, 4, 2), random_pair(4, 5, 2)), "found: 4 x 4, 4 x 5"),
        (lambda: scaled(random_pair(4, 4, 2), float("nan")), "weight is nan"),
        (lambda: ties([random_pair(4, 4, 2)], [1.0], density=0.0), "density 0.0 is no share"),
    ],
)
def test_what_cannot_be_summed_is_named(call, words):
    with pytest.raises(AdapterError, match=words):
        call()
