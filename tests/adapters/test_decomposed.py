"""Smaller, capped and scaled forms of an adapter, against dense SVDs of its deltas."""

from dataclasses import replace

import pytest
import torch

from loralab.adapters import Adapter, Decomposed, LoRAConfig, num_bytes
from loralab.errors import AdapterError

SHAPES = {"a.q_proj": (12, 8, 6), "a.v_proj": (6, 8, 6), "b.up": (20, 8, 3)}


@pytest.fixture
def adapter() -> Adapter:
    chance = torch.Generator().manual_seed(0)
    pairs = {
        name: (
            torch.randn(rank, into, generator=chance),
            torch.randn(out, rank, generator=chance) / (1 + len(name)),
        )
        for name, (out, into, rank) in SHAPES.items()
    }
    config = LoRAConfig(
        rank=6,
        alpha=3.0,
        targets=("q_proj", "v_proj", "up"),
        rank_pattern={"up": 3},
        alpha_pattern={"v_proj": 12.0},
        scaling="alpha/sqrt(rank)",
    )
    return Adapter(config=config, pairs=pairs, extra={"score.weight": torch.ones(2, 8)})


def dense(adapter: Adapter, module: str) -> torch.Tensor:
    pair = adapter.factors(module)
    return pair.scale * pair.B.double() @ pair.A.double()


def test_truncation_reaches_the_svd_bound_and_keeps_the_rest(adapter: Adapter) -> None:
    whole = Decomposed(adapter)
    ranks = {"a.q_proj": 2, "a.v_proj": 4, "b.up": 5}  # `up` has 3: it stays as it is
    small = whole.truncated(ranks)
    dropped = total = 0.0
    for module, rank in ranks.items():
        wanted = dense(adapter, module)
        U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close(dense(small, module), best, atol=1e-5, rtol=1e-4)
        dropped += float((S[rank:] ** 2).sum())
        total += float((S**2).sum())
    assert small.pairs["b.up"][0] is adapter.pairs["b.up"][0]
    assert [A.shape[0] for A, _ in small.pairs.values()] == [2, 4, 3]
    assert whole.relative_error(ranks) == pytest.approx((dropped / total) ** 0.5, rel=1e-5)
    assert small.extra == adapter.extra
    assert num_bytes(small) == 4 * small.num_parameters < num_bytes(adapter)


def test_the_global_ranks_take_no_more_than_the_uniform_ones(adapter: Adapter) -> None:
    whole = Decomposed(adapter)
    for rank in (1, 2, 4):
        uniform, shared = whole.uniform_ranks(rank), whole.global_ranks(rank)
        sizes = [sum(whole.cost(m) * k for m, k in ranks.items()) for ranks in (uniform, shared)]
        assert sizes[1] <= sizes[0]
        assert set(shared) == set(adapter.pairs) and min(shared.values()) >= 1


def test_a_cap_lowers_only_what_is_above_it(adapter: Adapter) -> None:
    values = torch.linalg.svdvals(dense(adapter, "a.q_proj"))
    limit = float(values[1] + values[2]) / 2
    capped = Decomposed(adapter).capped({"a.q_proj": limit, "b.up": 1e9})
    after = torch.linalg.svdvals(dense(capped, "a.q_proj"))[: len(values)]
    torch.testing.assert_close(after, values.clamp(max=limit), atol=1e-5, rtol=1e-5)
    assert capped.pairs["b.up"][0] is adapter.pairs["b.up"][0]


def test_scaling_is_of_the_deltas_alone(adapter: Adapter) -> None:
    half = Decomposed(adapter).scaled(0.5)
    for module in adapter.pairs:
        torch.testing.assert_close(dense(half, module), 0.5 * dense(adapter, module))
    assert half.extra == adapter.extra


def test_an_attention_and_its_output_projection_get_one_rank() -> None:
    chance = torch.Generator().manual_seed(1)

    def pair(size: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(4, 6, generator=chance), size * torch.randn(6, 4, generator=chance)

    config = LoRAConfig(rank=4, targets=("attn", "attn.out_proj", "other"))
    pairs = {"attn": pair(0.1), "attn.out_proj": pair(1.0), "other": pair(1.0)}
    ranks = Decomposed(Adapter(config=config, pairs=pairs)).global_ranks(2)
    assert ranks["attn"] == ranks["attn.out_proj"]


def test_ranks_that_cannot_be_are_all_named(adapter: Adapter) -> None:
    with pytest.raises(AdapterError, match=r"a\.q_proj: rank 0; no module 'c'"):
        Decomposed(adapter).truncated({"a.q_proj": 0, "c": 2})
    bare = Decomposed(replace(adapter, pairs={}))
    assert bare.rank == 0 and not bare.svds
