"""Where training starts, against PEFT's own starts and the papers' formulas."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from loralab.errors import AdapterError
from loralab.lowrank import (
    INITIALISERS,
    Factors,
    allocate_ranks,
    delta,
    eva,
    fast_pissa,
    initial_std,
    initialiser,
    input_spectrum,
    kaiming,
    lora_ga,
    olora,
    orthogonal,
    pissa,
    to_plain,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(out: int, into: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, into, generator=seeded(seed))


ALL = [*INITIALISERS, "fast pissa", "eva", "lora_ga"]


def strategy(name: str, weight: torch.Tensor):
    if name == "fast pissa":
        return fast_pissa()
    if name == "eva":
        return eva(input_spectrum(torch.randn(64, weight.shape[1], generator=seeded(5)), kept=16))
    if name == "lora_ga":
        return lora_ga(torch.randn(weight.shape, generator=seeded(6)))
    return initialiser(name)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(st.integers(12, 30), st.integers(12, 30), st.sampled_from([2, 4, 6]), st.integers(0, 99))
def test_the_output_is_kept_at_the_start(name, out, into, rank, seed):
    weight = weight_of(out, into, seed)
    start = strategy(name, weight)(weight, rank, 2.0, seeded(seed))
    assert start.A.shape == (rank, into)
    assert start.B.shape == (out, rank)
    assert start.A.dtype == start.B.dtype == torch.float32
    moved = weight if start.base_change is None else weight + delta(start.base_change)
    assert torch.allclose(moved + delta(Factors(start.A, start.B, 2.0)), weight, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_what_was_trained_converts_exactly_to_the_untouched_base(name):
    weight = weight_of(24, 20)
    start = strategy(name, weight)(weight, 4, 0.7, seeded())
    trained = Factors(
        A=start.A + 0.1 * torch.randn(4, 20), B=start.B + 0.1 * torch.randn(24, 4), scale=0.7
    )
    plain = to_plain(trained, start)
    moved = 0 if start.base_change is None else delta(start.base_change).double()
    expected = moved + 0.7 * trained.B.double() @ trained.A.double()
    found = plain.scale * plain.B.double() @ plain.A.double()
    assert plain.rank <= 8
    assert plain.scale == 0.7
    assert torch.allclose(found, expected, atol=1e-6)
    if start.base_change is not None:  # not one bit is rounded on the way
        assert torch.equal(plain.A, torch.cat([trained.A, start.A]))
        assert torch.equal(plain.B, torch.cat([trained.B, -start.B], 1))


@pytest.mark.parametrize("name", ALL)
def test_a_generator_decides_the_start(name):
    weight = weight_of(24, 20)
    one, two = (strategy(name, weight)(weight, 4, 1.0, seeded(3)) for _ in range(2))
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)


@pytest.mark.parametrize(("name", "start"), [("pissa", pissa), ("olora", olora)])
def test_peft_starts_at_the_same_delta(name, start):
    layer = nn.Linear(20, 24, bias=False)
    ours = start(layer.weight.detach().clone(), 4, 2.0)
    before = layer.weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=name)
    theirs = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert torch.allclose(ours.B @ ours.A, B @ A, atol=1e-5)
    assert ours.base_change is not None
    assert torch.allclose(before + delta(ours.base_change), theirs.base_layer.weight, atol=1e-5)


def test_pissa_takes_the_best_part_of_the_weight():
    weight = weight_of(24, 20)
    for start in (pissa(weight, 4, 2.0), fast_pissa()(weight, 4, 2.0, seeded())):
        assert start.base_change is not None
        left = torch.linalg.svdvals(weight + delta(start.base_change))
        assert torch.allclose(left[:16], torch.linalg.svdvals(weight)[4:], atol=1e-4)
        assert torch.allclose(start.A.norm(dim=1), start.B.norm(dim=0), atol=1e-4)


def test_lora_ga_starts_along_the_gradient():
    """The first update of B A is then the gradient's best approximation of rank 2 rank."""
    gradient = torch.randn(24, 20, generator=seeded(1))
    U, _, Vh = torch.linalg.svd(gradient)
    start = lora_ga(gradient, gamma=16)(weight_of(24, 20), 4, 1.0, None)
    factor = 24**0.25 / 4
    # the same directions; their signs are anyone's choice
    assert torch.allclose((start.A @ Vh[:4].mT).abs(), factor * torch.eye(4), atol=1e-5)
    assert torch.allclose((U[:, 4:8].mT @ start.B).abs(), factor * torch.eye(4), atol=1e-5)
    update = start.B @ (start.B.mT @ gradient) + (gradient @ start.A.mT) @ start.A
    best = U[:, :8] * torch.linalg.svdvals(gradient)[:8] @ Vh[:8]
    assert torch.allclose(update / factor**2, best, atol=1e-4)


def test_eva_follows_the_inputs_batch_by_batch():
    basis = torch.linalg.qr(torch.randn(20, 3, generator=seeded(2))).Q
    rows = torch.randn(90, 3, generator=seeded(3)) * torch.tensor([3.0, 2.0, 1.0]) @ basis.mT
    spectrum = None
    for batch in rows.split(30):
        spectrum = input_spectrum(batch, kept=6, before=spectrum)
    assert spectrum is not None
    _, S, Vh = torch.linalg.svd(rows)
    assert spectrum.num_rows == 90
    assert torch.allclose(spectrum.S[:3], S[:3], rtol=1e-4)
    start = eva(spectrum)(weight_of(24, 20), 3, 1.0, None)
    assert torch.allclose((start.A @ Vh[:3].mT).abs(), torch.eye(3), atol=1e-3)
    assert float(spectrum.explained_variance.sum()) == pytest.approx(1, rel=1e-5)
    assert start.base_change is None


def test_ranks_go_where_they_explain_most():
    explained = {
        "a": torch.tensor([0.9, 0.05, 0.01, 0.01]),
        "b": torch.tensor([0.3, 0.25, 0.2, 0.15]),
        "c": torch.tensor([0.04, 0.03, 0.02, 0.01]),
    }
    ranks = allocate_ranks(explained, rank=2)
    assert ranks == {"a": 2, "b": 4, "c": 0}
    assert sum(ranks.values()) == 6
    assert allocate_ranks(explained, rank=2, max_rank=2) == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "eva"])
def test_the_initial_std_is_the_one_that_is_drawn(name):
    weight = weight_of(8, 512)
    rows = torch.randn(600, 512, generator=seeded(4))
    start = eva(input_spectrum(rows, kept=64)) if name == "eva" else initialiser(name)
    A = start(weight, 64, 1.0, seeded()).A
    assert float(A.std()) == pytest.approx(initial_std(name, 64, 512), rel=0.02)


def test_kaiming_is_torch_kaiming():
    assert float(kaiming(weight_of(8, 100), 50, 1.0, seeded()).A.abs().max()) <= 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: initialiser("pisa"), "did you mean 'pissa'"),
        (lambda: initialiser("eva"), "'eva' is made from data"),
        (lambda: pissa(weight_of(4, 9), 5, 1.0), "'pissa' needs 5 directions; a weight of 4 x 9"),
        (lambda: orthogonal(weight_of(9, 9), 3, 1.0), "rank 3 is odd"),
        (lambda: lora_ga(weight_of(9, 9))(weight_of(9, 9), 5, 1.0, None), "needs 10 directions"),
        (lambda: lora_ga(weight_of(9, 8))(weight_of(9, 9), 2, 1.0, None), "the gradient is"),
        (
            lambda: eva(input_spectrum(weight_of(3, 9), 8))(weight_of(9, 9), 4, 1.0, None),
            "rank 4 needs as many input directions, 3 are known",
        ),
        (lambda: initial_std("pissa", 4, 9), "B does not start at zero"),
    ],
)
def test_what_cannot_start_is_named(call, words):
    with pytest.raises(AdapterError, match=words):
        call()
