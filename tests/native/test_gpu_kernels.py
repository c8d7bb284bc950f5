"""Law: each kernel for GPUs gives what torch gives. Where there is no GPU, Triton interprets it."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from laws import assert_near, check_gates, check_norm, check_pairs, doubles
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.adapters import LoRAConfig, SharedInput, adapter_parameters, attach, use
from loralab.adapters.step import Part, low_rank_step
from loralab.fusion import fused, matching_blocks
from loralab.fusion.pieces import Angles, rotate, rotate_back
from loralab.native import on_gpu, training as native
from loralab.placement import planned_for

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":  # the interpreter cuts 16-bit numbers off where GPUs round them
        monkeypatch.setitem(laws.TOLERANCE, torch.bfloat16, 1.2e-2)
        monkeypatch.setitem(laws.TOLERANCE, torch.float16, 1.5e-3)
    with planned_for("cuda"), torch.device(DEVICE):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropped", [False, True])
def test_low_rank_pairs(dtype: torch.dtype, dropped: bool) -> None:
    check_pairs(dtype, dropped, rows=101, ranks=[5, 16, 33], outs=[48, 96, 16], hidden=dtype)


@pytest.mark.parametrize(
    ("rows", "ranks", "outs", "width"),
    [
        (7, [1], [32], 64),
        (70, [130], [9], 50),  # more ranks than one program has, sides that divide nothing
        (300, [4, 4], [20, 130], 140),  # rows in several splits, several programs
    ],
)
def test_sizes_of_pairs(rows: int, ranks: list[int], outs: list[int], width: int) -> None:
    check_pairs(torch.float32, True, rows, ranks, outs, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(37, 96), (9, 3000)])
def test_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    check_norm(dtype, rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", native.ACTIVATIONS)
def test_gates(dtype: torch.dtype, name: str) -> None:
    check_gates(dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_angles", [1, 3])
def test_rotation(dtype: torch.dtype, num_angles: int) -> None:
    torch.manual_seed(0)
    batch, tokens, heads, size = 3, 5, 6, 8
    rows = torch.randn(batch * tokens, heads * size).to(dtype)
    cos, sin = (torch.randn(num_angles, tokens, size).to(dtype) for _ in range(2))
    assert native.covers_rotation(rows, cos, sin)
    (wide,) = doubles(rows)
    angles = Angles(cos.double(), sin.double())
    for back, formula in ((False, rotate), (True, rotate_back)):
        turned = formula(wide.view(batch, tokens, heads, size).transpose(1, 2), angles)
        right = turned.transpose(1, 2).reshape(rows.shape)
        assert_near(native.rotated(rows, cos, sin, back=back), right.detach())


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_several_adapters(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter's begin anywhere, the first three are the base's, some have no dropout.

    Transposed gradients go another way, forward and backward still agree.
    """
    torch.manual_seed(0)
    x, weights = torch.randn(40, 48), (torch.randn(32, 48), torch.randn(24, 48))
    parts = (
        Part((0.5, 2.0), 0.4, "one row", slice(3, 4)),
        Part((None, 0.5), 0.0, "without dropout", slice(4, 21)),
        Part((3.0, 1), 0.2, "others", slice(21, 40)),
    )
    shared = SharedInput(weights, (None, torch.randn(24)), parts)
    sizes = [(3, 32), (1, 24), (5, 24), (17, 32), (2, 24)]
    factors = [
        factor for rank, out in sizes for factor in (torch.randn(rank, 48), torch.randn(out, rank))
    ]
    leaves = [each.requires_grad_() for each in (x, *factors)]
    gradients = [torch.randn(len(weight), 40).mT for weight in weights]

    def values() -> list[torch.Tensor]:
        torch.manual_seed(1)
        outputs = low_rank_step(x, shared, factors)
        given = gradients if transposed else [g.contiguous() for g in gradients]
        return [*outputs, *torch.autograd.grad(outputs, leaves, given)]

    by_kernels = values()
    monkeypatch.setattr(on_gpu, "covers", lambda rows: False)
    for got, wanted in zip(by_kernels, values(), strict=True):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_equal_inputs_give_equal_bits() -> None:
    torch.manual_seed(0)
    x, g, A, B = (torch.randn(*shape) for shape in ((300, 64), (300, 48), (8, 64), (48, 8)))
    found = [native.pairs_backward(x, [A], [native.Pair(B, 1.0, g)], None, None) for _ in range(2)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0])


def test_no_rows_give_gradients_of_zero() -> None:
    x, g, A, B = torch.ones(0, 32), torch.ones(0, 48), torch.ones(8, 32), torch.ones(48, 8)
    grad_As, grad_Bs = native.pairs_backward(x, [A], [native.Pair(B, 1.0, g)], None, None)
    assert torch.equal(grad_As[0], torch.zeros(8, 32))
    assert torch.equal(grad_Bs[0], torch.zeros(48, 8))


def test_other_kernels_have_another_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under which a checkpoint is not gone on with, since bits differ."""
    name = native.build_name(torch.device("cuda"))
    assert name.startswith("triton-")
    assert native.build_name(torch.device("cuda")) == name
    changed = tmp_path / "gpu_kernels.py"
    changed.write_bytes(on_gpu._SOURCES[1].read_bytes() + b"# another sum")
    monkeypatch.setattr(on_gpu, "_SOURCES", (on_gpu._SOURCES[0], changed))
    assert native.build_name(torch.device("cuda")) != name


def test_a_whole_step_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config)
    attach(model, LoRAConfig(rank=4, dropout=0.3), seed=0)
    factors = adapter_parameters(model, "default")
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(std=0.1)
    ids = torch.randint(1, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        matched = matching_blocks(model)
        assert len(matched) == 2
        with use(model, "default"), fused(matched):
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found = [factor.grad for factor in factors.values() if factor.grad is not None]
        model.zero_grad()
        return found

    calls: list[str] = []
    run = on_gpu._run

    def watched(name: str, *given: Any, **constants: Any) -> None:
        calls.append(name)
        run(name, *given, **constants)

    monkeypatch.setattr(on_gpu, "_run", watched)
    by_kernels = gradients()
    backward = {"contract", "outer", "expand", "norm_backward", "gated_backward", "rotated"}
    assert set(calls) == backward | {"norm", "gated"}
    monkeypatch.setattr(on_gpu, "covers", lambda rows: False)
    by_torch = gradients()
    assert len(by_torch) == len(factors) == 2 * 2 * 7
    for got, wanted in zip(by_kernels, by_torch, strict=True):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_what_they_do_not_cover() -> None:
    rows = torch.ones(4, 32)
    assert native.covers(rows)
    assert native.covers(torch.ones(4, 30))
    for other in (rows.double(), rows[:, :24], rows.mT, torch.ones(1, on_gpu.MOST_COLUMNS + 1)):
        assert not native.covers(other)


def test_plans_see_their_outputs_and_call_nothing() -> None:
    with FakeTensorMode():
        x = torch.ones(4, 32)
        assert native.covers(x)
        n, inverse = native.norm(x, torch.ones(32), 1e-6)
        A, B = torch.ones(2, 32), torch.ones(8, 2)
        found = native.pairs_backward(x, [A], [native.Pair(B, 1.0, torch.ones(4, 8))], None, None)
    assert (n.shape, inverse.shape) == (x.shape, (4, 1))
    assert [found[0][0].shape, found[1][0].shape] == [A.shape, B.shape]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is known of devices is found out anew, before and after."""
    caches = (on_gpu.is_usable, on_gpu.load_kernels)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_kernel_that_gives_wrong_numbers_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = on_gpu.norm_backward
    monkeypatch.setattr(on_gpu, "norm_backward", lambda *given: right(*given).mul_(1.01))
    with caplog.at_level(logging.WARNING, "loralab"):
        assert not native.covers(torch.ones(4, 32))
        assert not native.covers(torch.ones(4, 32))
    assert [record.getMessage() for record in caplog.records] == [
        "training in torch.float32 runs on torch's operations: "
        f"the kernel norm_backward gives wrong numbers on {torch.ones(1).device}"
    ]


@pytest.mark.usefixtures("forgotten")
def test_tiles_that_a_gpu_has_no_room_for_are_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = on_gpu._run

    def short_of_memory(name: str, *given: Any, **constants: Any) -> None:
        if constants.get("RANKS") == 64:
            raise RuntimeError("out of resource: shared memory")
        run(name, *given, **constants)

    monkeypatch.setattr(on_gpu, "_run", short_of_memory)
    with caplog.at_level(logging.WARNING, "loralab"):
        assert not native.covers(torch.ones(4, 32))
    assert "runs on torch's operations: out of resource: shared memory" in caplog.text


@pytest.mark.usefixtures("forgotten")
def test_they_are_tried_out_wherever_rows_come_first() -> None:
    """In an evaluation, and in a forward whose kept tensors are counted and made again."""
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert native.covers(torch.ones(4, 32))
    assert torch.equal(torch.get_rng_state(), before)
    on_gpu.is_usable.cache_clear()
    weight, A, B = torch.randn(48, 32), torch.randn(4, 32), torch.randn(48, 4)
    shared = SharedInput((weight,), (None,), (Part((0.5,)),))
    x = torch.randn(5, 32, requires_grad=True)
    (y,) = checkpoint(low_rank_step, x, shared, [A, B], use_reentrant=False)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    assert on_gpu.is_usable.cache_info().misses == 1
    assert_near(grad_x, (weight + 0.5 * B @ A).sum(0).expand(5, 32))


@pytest.mark.usefixtures("forgotten")
def test_without_triton_torch_stands_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "loralab.native.gpu_kernels", raising=False)
    monkeypatch.delattr("loralab.native.gpu_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING, "loralab"):
        assert not native.covers(torch.ones(4, 32))
    assert "no Triton" in caplog.text
    assert native.build_name(torch.device("cuda")) == "none"


@pytest.mark.usefixtures("forgotten")
def test_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_KERNELS", "off")
    assert not native.covers(torch.ones(4, 32))
    assert native.build_name(torch.device("cuda")) == "none"


@pytest.mark.slow
def test_they_compile_for_every_kind_of_gpu() -> None:
    """For real, by Triton's own compiler, which needs no GPU."""
    script = Path(__file__).with_name("compile_gpu_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 40
