"""Law: each call of the training kernel gives what torch gives, in every build of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import assert_near, check_gates, check_norm, check_pairs, doubles
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from loralab.native import Kernel, convolutions, load_kernel, on_cpu, training as native

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    load_kernel(native.KERNEL) is None, reason="no C++ compiler makes the kernel here"
)


@pytest.fixture(params=["as it is built", "wide vectors"], autouse=True)
def build_of_kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as this processor gets it, and with the vectors of processors with AVX-512."""
    if request.param == "wide vectors":
        flags = (*native.KERNEL.flags, "-DLORALAB_WIDE")
        wide = Kernel("training", Path(native.__file__).with_name("kernel"), flags)
        for module in (on_cpu, convolutions):
            monkeypatch.setattr(module, "KERNEL", wide)


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("rows", "ranks", "outs"), [(101, [5, 16, 33], [48, 96, 16]), (7, [1], [32])]
)
def test_low_rank_pairs(
    dtype: torch.dtype, dropped: bool, rows: int, ranks: list[int], outs: list[int]
) -> None:
    check_pairs(dtype, dropped, rows, ranks, outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    check_norm(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", native.ACTIVATIONS)
def test_gates(dtype: torch.dtype, name: str) -> None:
    check_gates(dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "allowed", "added"])
@pytest.mark.parametrize("wanted", [None, [[3, 20], [5, 0], [7, 8]]], ids=["all", "some"])
@pytest.mark.parametrize("num_angles", [1, 3])
def test_attention(dtype: torch.dtype, kind: str, wanted: Any, num_angles: int) -> None:
    torch.manual_seed(0)
    batch, tokens, heads, groups, size = 3, 21, 4, 2, 32
    q, k, v = (torch.randn(batch * tokens, n * size).to(dtype) for n in (heads, groups, groups))
    angle = torch.rand(num_angles, tokens, size // 2).mul(6).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    if kind != "causal":
        allowed[1, :, :, :4] = False  # a row that is padded on the left
        allowed[1, :, :4, 0] = True
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(dtype).min).to(dtype)
    mask = {"causal": None, "allowed": allowed, "added": added}[kind]
    positions = None if wanted is None else torch.tensor(wanted)

    q_, k_, v_ = leaves = doubles(q, k, v)
    turned_q, turned_k = (
        _turned(_heads(x, batch, size), cos.double(), sin.double()) for x in (q_, k_)
    )
    out = F.scaled_dot_product_attention(
        turned_q, turned_k, _heads(v_, batch, size), attn_mask=allowed, enable_gqa=True
    )
    if positions is not None:
        out = out.gather(2, positions[:, None, :, None].expand(batch, heads, -1, size))
    right = out.transpose(1, 2).flatten(2).flatten(0, 1)
    g = torch.randn(right.shape).to(dtype)
    right.backward(g.double())

    attention = native.attention((q, k, v), (cos, sin), mask, positions)
    assert attention is not None
    assert_near(attention.forward(), right)
    for got, leaf in zip(attention.backward(g), leaves, strict=True):
        assert leaf.grad is not None
        assert_near(got, leaf.grad)


def _heads(rows: Tensor, batch: int, size: int) -> Tensor:
    return rows.view(batch, -1, rows.shape[1] // size, size).transpose(1, 2)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


CONVOLUTIONS = {  # batch, channels, input, out, kernel, stride, padding, dilation, rank
    "small images, several at once": (5, 6, (4, 4), 7, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "a walk of steps and gaps": (3, 5, (9, 7), 6, (3, 2), (2, 1), (1, 0), (1, 2), 3),
    "bands, the last one smaller": (2, 70, (70, 33), 9, (3, 3), (1, 1), (1, 1), (1, 1), 20),
    "wider than a band": (1, 3, (4, 150), 5, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "one dimension": (2, 4, (50,), 6, (5,), (3,), (2,), (2,), 9),
    "1 x 1, not all is read": (2, 4, (5, 5), 6, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "more padding than image": (2, 3, (2, 2), 4, (5, 5), (1, 1), (9, 9), (1, 1), 4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_pairs_of_convolutions(name: str) -> None:
    torch.manual_seed(0)
    batch, channels, size, out, kernel, stride, padding, dilation, rank = CONVOLUTIONS[name]
    x, weight = torch.randn(batch, channels, *size), torch.randn(out, channels, *kernel)
    A, B = torch.randn(rank, weight[0].numel()), torch.randn(out, rank)
    x_, weight_, A_, B_ = doubles(x, weight, A, B)
    convolve: Any = F.conv2d if len(size) == 2 else F.conv1d
    merged = weight_ + (0.5 * B_ @ A_).view_as(weight_)
    y = convolve(x_, merged, None, stride, padding, dilation)
    g = torch.randn(y.shape)
    wanted = torch.autograd.grad(y, [A_, B_], g.double())

    assert convolutions.covers(x, A, B)
    assert_near(convolutions.merged(weight, A, B, 0.5), merged)
    walk = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    got = convolutions.pair_gradients(x, g, A, B, scale=0.5, **walk)
    for own, right in zip(got, wanted, strict=True):
        assert_near(own, right)


def test_convolutions_that_it_does_not_cover() -> None:
    x, A, B = torch.randn(2, 3, 4, 4), torch.randn(2, 27), torch.randn(5, 2)
    for others in ((x.double(), A, B), (x[None], A, B), (x, A.double(), B), (x, A, B.bfloat16())):
        assert not convolutions.covers(*others)


def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(4, 32)
    x[2, 5] = torch.nan
    n, _ = native.norm(x, torch.ones(32), 1e-6)
    assert n.isnan().all(dim=1).tolist() == [False, False, True, False]
    gated = native.gated(x, torch.ones(4, 32), 0)
    assert gated.isnan().nonzero().tolist() == [[2, 5]]


def test_what_it_does_not_cover() -> None:
    rows = torch.ones(4, 32)
    assert native.covers(rows)
    for other in (rows.double(), rows[:, :24], rows.mT, rows.to("meta"), torch.ones(4, 30)):
        assert not native.covers(other)


def test_plans_see_its_outputs_and_call_nothing() -> None:
    with FakeTensorMode():
        x = torch.ones(4, 32)
        assert native.covers(x)
        n, inverse = native.norm(x, torch.ones(32), 1e-6)
    assert n.shape == x.shape
    assert inverse.shape == (4, 1)
