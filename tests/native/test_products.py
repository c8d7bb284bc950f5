"""Law: products in fp32 give what products of 16 bits should, to the last rounding."""

import pytest
import torch

from loralab.native import products


@pytest.fixture(params=[False, True], ids=["with instructions", "without"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_has_instructions", lambda dtype: not request.param)
    return request.param


def test_linear_and_its_gradient(widened: bool) -> None:
    torch.manual_seed(0)
    x, beside = torch.randn(9, 24).bfloat16(), torch.randn(9, 24).bfloat16()
    weights = [torch.randn(out, 24).bfloat16() for out in (8, 16)]
    biases = [None, torch.randn(16).bfloat16()]
    gradients = [torch.randn(9, out).bfloat16() for out in (8, 16)]
    outputs = products.linear(x, weights, biases)
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        wanted = x.double() @ weight.double().mT + (0 if bias is None else bias.double())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)
    through = sum(g.double() @ w.double() for g, w in zip(gradients, weights, strict=True))
    for start in (None, beside.clone()):
        wanted = through if start is None else through + start.double()
        got = products.linear_backward(gradients, weights, start)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=6e-2)
    if widened:  # one rounding, at the end
        exact = products.linear_backward(gradients, weights, beside.clone()).double()
        assert torch.equal(exact, (through + beside.double()).float().bfloat16().double())


def test_fp32_is_left_alone() -> None:
    assert not products.are_widened(torch.float32, torch.device("cpu"))
    assert not products.are_widened(torch.bfloat16, torch.device("cuda"))
