"""The training step of convolutions: the plain formula, with the input alone kept."""

import pytest
import torch
from torch import nn

from loralab.adapters import LoRAConfig, adapter_parameters, attach, following, use

CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 8)),
    "2d without a bias": (nn.Conv2d(4, 6, 1, bias=False), (3, 4, 5, 5)),
    "2d grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 4)),
}


def adapted(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
    """The convolution with a pair that does something, and an input."""
    conv, shape = CONVOLUTIONS[name]
    torch.manual_seed(1)
    model = nn.Sequential(type(conv)(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, conv.bias is not None, dtype=dtype,
    ))  # fmt: skip
    attach(model, LoRAConfig(rank=2, alpha=3, dropout=dropout, targets=["0"]), name="a", seed=0)
    for value in adapter_parameters(model, "a").values():
        value.data = torch.randn_like(value, dtype=dtype)
    return model, torch.randn(shape, dtype=dtype)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    with use(model, "a"):
        y = model(x)
    torch.manual_seed(5)
    g = torch.randn(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *adapter_parameters(model, "a").values()], g)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_the_plain_formula(name: str, dropout: float, monkeypatch) -> None:
    model, x = adapted(name, dropout)
    model.train()
    ours = gradients(model, x)
    monkeypatch.setattr(following, "convolution_of", lambda module, mix: None)
    plain = gradients(model, x)
    for own, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_the_plain_formula_in_single_precision(name: str, monkeypatch) -> None:
    """There a kernel computes the gradients of the factors (room native)."""
    model, x = adapted(name, dtype=torch.float32)
    model.train()
    ours = gradients(model, x)
    model.double()
    monkeypatch.setattr(following, "convolution_of", lambda module, mix: None)
    plain = gradients(model, x.double())
    for own, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(own.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_are_right(name: str, dropout: float) -> None:
    model, x = adapted(name, dropout)
    model.train()
    A, B = adapter_parameters(model, "a").values()

    def output(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(9)
        with use(model, "a"):
            return torch.func.functional_call(model, {"0.adapters.a.A": a, "0.adapters.a.B": b}, x)

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), A, B))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_several_adapters_are_what_each_is_alone(dtype: torch.dtype, monkeypatch) -> None:
    """Each adapter has a stretch of rows, of its own length; one stretch is the base's."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, dtype=dtype)).train()
    for number, name in enumerate("abc"):
        attach(model, LoRAConfig(rank=2 + number, targets=["0"]), name=name, seed=number)
        for value in adapter_parameters(model, name).values():
            value.data = torch.randn_like(value, dtype=dtype)
    stretches = {"a": slice(0, 3), None: slice(3, 4), "b": slice(4, 6), "c": slice(6, 7)}
    route = ["a"] * 3 + [None] + ["b"] * 2 + ["c"]
    x, g = torch.randn(7, 4, 8, 8, dtype=dtype), torch.randn(7, 6, 8, 8, dtype=dtype)
    taken: list[int] = []
    real = following.convolution_step
    monkeypatch.setattr(
        following, "convolution_step", lambda x, *rest: taken.append(len(x)) or real(x, *rest)
    )

    def gradients_of(route, rows: slice, names: str) -> list[torch.Tensor]:
        own = x[rows].clone().requires_grad_()
        factors = [v for name in names for v in adapter_parameters(model, name).values()]
        with use(model, route):
            y = model(own)
        return [y, *torch.autograd.grad(y, [own, *factors], g[rows])]

    y, grad_x, *factors = gradients_of(route, slice(0, 7), "abc")
    assert taken == [3, 2, 1]
    for name, rows in stretches.items():
        own_y, own_grad_x, *own = gradients_of(name, rows, name or "")
        torch.testing.assert_close(y[rows], own_y)
        torch.testing.assert_close(grad_x[rows], own_grad_x)
        for got, wanted in zip(factors, own, strict=False):
            torch.testing.assert_close(got, wanted)
        factors = factors[len(own) :]
    assert not factors


def test_only_the_input_is_kept() -> None:
    model, x = adapted("2d", dropout=0.2, dtype=torch.float32)
    x.requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), use(model, "a"):
        model(x)
    num_channels = x.shape[0] * x.shape[1]
    assert sum(kept.values()) == x.numel() * 4 + num_channels * 8


def test_half_precision_keeps_what_a_merged_kernel_would_round_away() -> None:
    model, x = adapted("2d", dtype=torch.float32)
    model.to(torch.bfloat16).eval()
    pair = model[0].adapters.get("a")
    pair.float()
    pair.B.data *= 1e-3
    with use(model, "a"):
        y = model(x.bfloat16()).float()
    change = y - model(x.bfloat16()).float()
    kernel = (pair.scale * pair.B @ pair.A).view_as(model[0].weight)
    wanted = model[0]._conv_forward(x, kernel, None)
    assert (change - wanted).norm() < 1.5 * wanted.norm()  # the output's own rounding


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_other_paddings_run_by_the_plain_formula(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)).eval()
    attach(model, LoRAConfig(rank=2, targets=["0"]), name="a", seed=0)
    pair = model[0].adapters.get("a")
    pair.B.data.normal_()
    x = torch.randn(2, 3, 5, 5)
    kernel = model[0].weight + (pair.scale * pair.B @ pair.A).view_as(model[0].weight)
    with use(model, "a"):
        torch.testing.assert_close(model(x), model[0]._conv_forward(x, kernel, model[0].bias))
