"""A combined adapter does to a model what its parts do, weighted."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from loralab.adapters import (
    Adapter,
    Layer,
    LoRAConfig,
    attach,
    combination,
    combine,
    content_hash,
    extract,
    install,
    merge,
    use,
)
from loralab.errors import AdapterError

SHAPES = {"net.0": (24, 16), "net.1.0": (16, 24), "net.11": (20, 16)}


def random_adapter(seed: int, *, modules=SHAPES, **settings_) -> Adapter:
    config = LoRAConfig(targets=tuple(modules), **settings_)
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, (out, into) in modules.items():
        rank = config.rank_at(module)
        pairs[module] = (
            torch.randn(rank, into, generator=generator),
            torch.randn(out, rank, generator=generator),
        )
    return Adapter(config=config, pairs=pairs)


def delta_of(adapter: Adapter, module: str) -> Tensor:
    """The oracle: PEFT's formula, in fp64."""
    if module not in adapter.pairs:
        return torch.zeros(1, 1, dtype=torch.float64)
    config, (A, B) = adapter.config, adapter.pairs[module]
    alpha, rank = config.alpha_at(module), A.shape[0]
    scale = alpha / rank if config.scaling == "alpha/rank" else alpha / rank**0.5
    return scale * B.double() @ A.double()


configs = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 6),
        "alpha": st.sampled_from([1.0, 8.0, 32.0]),
        "scaling": st.sampled_from(["alpha/rank", "alpha/sqrt(rank)"]),
        "rank_pattern": st.sampled_from([{}, {r"net.*0": 3}, {"net.0": 1, "net.1.0": 7}]),
        "alpha_pattern": st.sampled_from([{}, {"net.11": 5.0}]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(configs, st.floats(-2, 2)), min_size=1, max_size=4), st.data())
def test_linear_is_the_weighted_sum_of_deltas(drawn, data):
    adapters = []
    for index, (config, _) in enumerate(drawn):
        names = data.draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1))
        modules = {name: SHAPES[name] for name in SHAPES if name in names}
        adapters.append(random_adapter(index, modules=modules, **config))
    weights = [weight for _, weight in drawn]
    result = combine(adapters, weights)
    for module in result.pairs:
        wanted = sum(w * delta_of(a, module) for a, w in zip(adapters, weights, strict=True))
        assert torch.allclose(delta_of(result, module), wanted, atol=1e-3, rtol=1e-5)
        assert result.scale(module) == pytest.approx(
            result.config.alpha_at(module) / result.pairs[module][0].shape[0]
        )
        assert result.config.rank_at(module) == result.pairs[module][0].shape[0]
    assert set(result.pairs) == {module for a in adapters for module in a.pairs}


def test_one_adapter_at_weight_one_is_itself():
    adapter = random_adapter(0, scaling="alpha/sqrt(rank)")
    assert combine([adapter], [1.0]) is adapter
    dora = Adapter(adapter.config, adapter.pairs, magnitudes={"net.0": torch.ones(24)})
    assert combine([dora], [1]) is dora


def test_a_minus_a_is_zero():
    adapter = random_adapter(0, rank=5, scaling="alpha/sqrt(rank)")
    for module in SHAPES:
        assert not delta_of(combine([adapter, adapter], [1.0, -1.0]), module).any()


@pytest.mark.parametrize("method", ["linear", "knots"])
def test_cutting_reaches_the_bound_and_states_it(method):
    adapters = [random_adapter(k, rank=4) for k in range(3)]
    weights = [0.5, 0.3, 0.2]
    whole = combination(adapters, weights, method=method)
    cut = combination(adapters, weights, method=method, rank=3)
    assert not whole.errors
    assert set(cut.errors) == set(SHAPES)
    for module in SHAPES:
        wanted = delta_of(whole.adapter, module)
        values = torch.linalg.svdvals(wanted)
        error = float((delta_of(cut.adapter, module) - wanted).norm() / wanted.norm())
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)
        assert cut.errors[module] == pytest.approx(error, rel=1e-4)
        assert cut.adapter.pairs[module][0].shape[0] == 3


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "knots"])
def test_elementwise_methods_state_what_they_miss(method, caplog):
    adapters = [random_adapter(k, rank=2) for k in range(2)]
    found = combination(adapters, [1.0, 1.0], method=method, density=0.5, rank=3)
    assert all(0 < error < 1 for error in found.errors.values())
    assert all(A.shape[0] == 3 for A, _ in found.adapter.pairs.values())
    combine(adapters, [1.0, 1.0], method=method, density=0.5, rank=3)
    assert "combined with an error of at most" in caplog.text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2, padding=1)
        self.body = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.conv(x).mean((-1, -2))).relu()))


def net_with(*names: str, dora: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for index, name in enumerate(names):
        config = LoRAConfig(
            rank=2 + index,
            alpha=3.0,
            targets=("conv", "body"),
            whole_modules=("head", "norm"),
            scaling=("alpha/rank", "alpha/sqrt(rank)")[index % 2],
        )
        attach(model, config, name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f"adapters.{name}." in key:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_with_the_base_at_hand_the_sum_is_the_routes_mix():
    """Heads, norms and convolutions too: the route is the oracle."""
    model, x = net_with("a", "b"), torch.randn(5, 4, 6, 6)
    adapters = [extract(model, name) for name in ("a", "b")]
    found = combination(adapters, [0.7, -0.4], base=model)
    assert not found.notes
    install(model, found.adapter, "mix")
    with torch.no_grad():
        with use(model, {"a": 0.7, "b": -0.4}):
            expected = model(x)
        with use(model, "mix"):
            assert torch.allclose(model(x), expected, atol=1e-5)


def test_without_the_base_whole_tensors_are_a_stated_mean(caplog):
    model = net_with("a", "b")
    one, two = (extract(model, name) for name in ("a", "b"))
    found = combination([one, two], [3.0, 1.0])
    mean = 0.75 * one.extra["head.weight"] + 0.25 * two.extra["head.weight"]
    assert torch.allclose(found.adapter.extra["head.weight"], mean)
    assert found.adapter.whole_modules == one.whole_modules
    (note,) = found.notes
    assert "the weighted mean of the adapters' own tensors" in note
    assert "'norm.weight'" in note or "'head.weight'" in note
    with pytest.raises(AdapterError, match="weights that sum to zero have no mean; give the base"):
        combine([one, two], [1.0, -1.0])
    assert combine([one, two], [1.0, -1.0], base=model).pairs


def test_token_rows_are_mixed_row_by_row():
    table = nn.Embedding(6, 4)
    base = nn.ModuleDict({"words": table})

    def with_rows(rows: list[int], seed: int) -> Adapter:
        values = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(seed))
        config = LoRAConfig(targets=(), token_rows={"words": rows})
        return Adapter(config, {}, token_rows={"words": (torch.tensor(rows), values)})

    one, two = with_rows([1, 4], 0), with_rows([4, 5], 1)
    rows, values = combine([one, two], [2.0, 0.5], base=base).token_rows["words"]
    assert rows.tolist() == [1, 4, 5]
    start = table.weight.detach()
    first, second = one.token_rows["words"][1], two.token_rows["words"][1]
    assert torch.allclose(values[0], start[1] + 2 * (first[0] - start[1]))
    both = start[4] + 2 * (first[1] - start[4]) + 0.5 * (second[0] - start[4])
    assert torch.allclose(values[1], both, atol=1e-6)
    _, means = combine([one, two], [3.0, 1.0]).token_rows["words"]
    assert torch.allclose(means[1], 0.75 * first[1] + 0.25 * second[0])
    assert torch.equal(means[0], first[0])


def test_grouped_factors_are_summed_group_by_group():
    """PEFT's grouped form: B (out, rank / groups) maps each group's share of the rank."""

    def grouped(seed: int, rank: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(rank, 6, generator=generator)
        B = torch.randn(8, rank // 2, generator=generator)
        layer = Layer("conv2d", (3, 1), 2)
        config = LoRAConfig(rank=rank, alpha=3.0, targets=("conv",))
        return Adapter(config, {"conv": (A, B)}, layers={"conv": layer})

    def dense(adapter: Adapter) -> Tensor:
        A, B = adapter.pairs["conv"]
        parts = zip(A.chunk(2), B.chunk(2), strict=True)
        return adapter.scale("conv") * torch.cat([b @ a for a, b in parts])

    one, two = grouped(0, 2), grouped(1, 4)
    whole = combine([one, two], [0.5, -2.0])
    wanted = 0.5 * dense(one) - 2 * dense(two)
    assert torch.allclose(dense(whole), wanted, atol=1e-5)
    assert whole.layer("conv").groups == 2
    cut = combination([one, two], [0.5, -2.0], rank=2)
    error = float((dense(cut.adapter) - wanted).norm() / wanted.norm())
    assert cut.errors["conv"] == pytest.approx(error, rel=1e-4)


def test_dora_needs_the_base_and_a_size_and_is_then_near_the_true_delta():
    base = nn.Sequential(nn.Linear(16, 24))
    pairs = {"0": (torch.randn(2, 16), torch.randn(24, 2))}
    magnitude = base[0].weight.detach().norm(dim=1) * 1.3
    config = LoRAConfig(rank=2, alpha=4.0, targets=("0",), dora=True)
    dora = Adapter(config, pairs, magnitudes={"0": magnitude})
    plain = Adapter(LoRAConfig(rank=2, alpha=4.0, targets=("0",)), pairs)
    with pytest.raises(AdapterError) as raised:
        combine([dora, plain], [0.5, 0.5])
    assert "DoRA at '0': its delta is of full rank and depends on the base" in raised.value.cause
    assert "give `base` and a rank or energy" in raised.value.cause
    with pytest.raises(AdapterError, match="only method 'linear' can approximate it"):
        combine([dora, plain], [0.5, 0.5], method="ties", base=base, rank=2)
    weight = base[0].weight.detach()
    changed = weight + delta_of(plain, "0").float()
    dora_delta = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True) - weight
    wanted = 0.5 * dora_delta + 0.5 * (changed - weight)
    found = combination([dora, plain], [0.5, 0.5], base=base, rank=6)
    error = float((delta_of(found.adapter, "0") - wanted).norm() / wanted.norm())
    assert found.errors["0"] == pytest.approx(error, rel=1e-3)
    best = torch.linalg.svdvals(wanted)
    assert error <= 1.02 * float(best[6:].norm() / best.norm())
    assert not found.adapter.config.dora
    exact = combination([dora, plain], [0.5, 0.5], base=base, rank=16)
    assert torch.allclose(delta_of(exact.adapter, "0").float(), wanted, atol=1e-4)


def test_a_combined_adapter_merges_like_its_mix():
    model, x = net_with("a", "b"), torch.randn(5, 4, 6, 6)
    mixed = combine([extract(model, name) for name in ("a", "b")], [0.5, 0.5], base=model)
    install(model, mixed, "mix")
    merged, _ = merge(model, "mix")
    with torch.no_grad(), use(model, {"a": 0.5, "b": 0.5}):
        assert torch.allclose(merged(x), model(x), atol=1e-5)


def test_the_result_is_reproducible_and_plain():
    adapters = [random_adapter(k, rank=2) for k in range(2)]
    hashes = {
        content_hash(combine(adapters, [1.0, 1.0], method="dare", density=0.5, rank=4, seed=3))
        for _ in range(2)
    }
    assert len(hashes) == 1
    assert json.dumps(dict(combine(adapters, [1.0, 2.0]).config.rank_pattern)) == "{}"


def test_everything_that_cannot_be_combined_is_named_at_once():
    one = random_adapter(0, modules={"net.0": (24, 16)})
    two = random_adapter(1, modules={"net.0": (24, 12)})
    one = Adapter(one.config, one.pairs, base={"w": "2x2:00000000"})
    two = Adapter(two.config, two.pairs, base={"v": "2x2:00000000"})
    with pytest.raises(AdapterError) as raised:
        combine([one, two], [1.0, float("nan")], density=0.5)
    for words in (
        "4 fault(s)",
        "weight nan is not finite",
        "method 'linear' has no density",
        "trained on another base",
        "delta of 'net.0' has different shapes: (24, 12), (24, 16)",
    ):
        assert words in raised.value.cause
    assert "mix them with a route" in raised.value.next_step
    with pytest.raises(AdapterError, match="did you mean 'ties'"):
        combine([one], [1.0], method="tie")
    with pytest.raises(AdapterError, match="1 adapters but 2 weights"):
        combine([one], [1.0, 2.0])
