"""The training step of linear layers: the plain formula, with little kept and masks drawn again."""

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters import (
    LoRAConfig,
    SharedInput,
    adapter_parameters,
    attach,
    following,
    noise,
    use,
)
from loralab.adapters.noise import draw_places, kept, streams
from loralab.adapters.step import Part, low_rank_step


def shared_and_factors(dropout: float = 0.0) -> tuple[SharedInput, list[torch.Tensor]]:
    """Three layers on one input: ranks 2 and 5, and one without a pair."""
    torch.manual_seed(0)
    shared = SharedInput(
        weights=tuple(torch.randn(out, 6).double() for out in (4, 7, 3)),
        biases=(None, torch.randn(7).double(), None),
        parts=(Part((0.5, None, 2.0), dropout),),
    )
    shapes = [(2, 6), (4, 2), (5, 6), (3, 5)]
    return shared, [torch.randn(shape).double().requires_grad_() for shape in shapes]


def test_outputs_are_those_of_the_formula() -> None:
    shared, (A1, B1, A2, B2) = shared_and_factors()
    x = torch.randn(2, 3, 6).double()
    deltas = 0.5 * B1 @ A1, torch.zeros(7, 6), 2.0 * B2 @ A2
    for y, weight, bias, delta in zip(
        low_rank_step(x, shared, [A1, B1, A2, B2]), shared.weights, shared.biases, deltas,
        strict=True,
    ):  # fmt: skip
        wanted = nn.functional.linear(x, weight + delta, bias)
        torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_right(dropout: float) -> None:
    shared, factors = shared_and_factors(dropout)

    def outputs(x: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(9)
        return low_rank_step(x, shared, factors)

    x = torch.randn(2, 3, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *factors))


def test_a_model_may_change_the_outputs_in_place() -> None:
    shared, factors = shared_and_factors()
    gradients = []
    for change in (lambda y: y.div_(3), lambda y: y / 3):  # as Longformer does with its queries
        x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double()
        outputs = [change(y) for y in low_rank_step(x.requires_grad_(), shared, factors)]
        loss = sum(y.square().sum() for y in outputs)
        gradients.append(torch.autograd.grad(loss, [x, *factors]))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 32), lambda: Conv1D(32, 64)])
def test_only_the_input_is_kept(make) -> None:
    model = nn.Sequential(make())
    attach(model, LoRAConfig(rank=4, alpha=8, dropout=0.1), name="a", seed=0)
    kept_bytes: dict[int, int] = {}
    parameters = {id(p) for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in parameters:
            kept_bytes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(10, 64, requires_grad=True)
    with use(model, "a"), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model.train()(x)
    assert sorted(kept_bytes.values()) == [8 * 10, 4 * 10 * 64]  # the masks' places, the input


def test_expected_output_with_dropout_is_the_output_without() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    attach(model, LoRAConfig(rank=4, alpha=8, dropout=0.25), name="a", seed=0)
    for parameter in adapter_parameters(model, "a").values():
        nn.init.normal_(parameter)
    x = torch.randn(1, 8).expand(20_000, 8)
    with use(model, "a"), torch.no_grad():
        mean = model.train()(x).mean(0)
        spread = model(x).std(0) / 20_000**0.5
        wanted = model.eval()(x[0])
    assert (mean - wanted).abs().max() < 5 * spread.max()


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_masks_drop_the_wanted_share_independently(dropout: float) -> None:
    ones = torch.ones(2000, 512)
    torch.manual_seed(1)
    masks = [kept(ones, draw_places(ones), dropout) for _ in range(2)]
    share = 1 - dropout
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert abs(mask.mean() - share) < 0.01
        assert mask.mean(0).sub(share).abs().max() < 0.06  # no column is special
    first, second = masks
    for a, b in [(first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]:
        both = (a * b).mean()
        assert abs(both - share**2) < 0.01


def test_a_mask_comes_back_from_its_places() -> None:
    x = torch.randn(5, 3, 16)
    places = draw_places(x)
    assert torch.equal(kept(x, places, 0.3), kept(x, places, 0.3))
    for dtype, _ in itertools.product([torch.bfloat16, torch.float64], range(1)):
        assert torch.equal(kept(x, places, 0.3) == 0, kept(x.to(dtype), places, 0.3) == 0)


def test_rows_longer_than_the_table_have_a_table_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr(noise, "NUM_FLIPS", 1 << 10)
    x = torch.ones(64, 1500)
    places = draw_places(x)
    mask = noise.mask_at(x, places, 0.25)
    assert mask.shape == x.shape
    assert mask.mean().item() == pytest.approx(0.75, abs=0.02)
    assert len(places.unique()) > 32
    assert torch.equal(mask, noise.mask_at(x, places, 0.25))


def test_stretches_of_rows_use_their_own_adapters_and_streams() -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 4)}).double()
    for number, (name, rank, dropout) in enumerate([("a", 2, 0.4), ("b", 3, 0.0), ("c", 4, 0.2)]):
        config = LoRAConfig(rank=rank, dropout=dropout, targets=r"first|second")
        attach(model, config, name=name, seed=number)
        for parameter in adapter_parameters(model, name).values():
            nn.init.normal_(parameter)
    inputs = {name: torch.randn(rows, 6).double() for name, rows in (("a", 3), ("b", 4), ("c", 2))}

    def gradients(together: bool) -> list[torch.Tensor]:
        generators = {name: torch.Generator().manual_seed(7) for name in inputs}
        with streams(generators):
            if together:
                x = torch.cat(list(inputs.values()))[None]
                segments = torch.tensor([[0] * 3 + [1] * 4 + [2] * 2])
                with use(model, list(inputs), segments=segments):
                    outputs = [model["second"](model["first"](x)).square().sum()]
            else:
                outputs = []
                for name, x in inputs.items():
                    with use(model, name):
                        outputs.append(model["second"](model["first"](x)).square().sum())
        parameters = [p for name in inputs for p in adapter_parameters(model, name).values()]
        return list(torch.autograd.grad(sum(outputs), parameters))

    for got, wanted in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_step_of_dora_is_its_formula(
    bias: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32, bias=bias), nn.Tanh(), nn.Linear(32, 8))
    config = LoRAConfig(rank=3, alpha=6, targets=["0", "2"], dropout=dropout, dora=True)
    attach(model, config, name="a")
    parameters = adapter_parameters(model, "a")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(0.3 * torch.randn_like(parameter))
            assert parameter.requires_grad, name
    x = torch.randn(5, 24)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(7)  # the same masks
        leaf = x.clone().requires_grad_()
        with use(model, "a"):
            y = model(leaf)
        wanted = torch.autograd.grad(y.square().sum(), [leaf, *parameters.values()])
        return [y, *wanted]

    calls = []
    step = following.decompose
    monkeypatch.setattr(following, "decompose", lambda *a: calls.append(1) or step(*a))
    by_step = results()
    assert len(calls) == 2
    monkeypatch.setattr(following, "decomposed_member", lambda module, mix: None)
    for got, wanted in zip(by_step, results(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
