"""The base's running statistics stay; an adapter that trains a norm takes its own along."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_oracle import peft_reads, peft_runs, shake
from torch import Tensor, nn

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    detach,
    extract,
    load_adapter,
    merge,
    merge_in_place,
    restore,
    save_adapter,
    use,
)
from loralab.errors import RouteError

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(6),
    "sync": lambda: nn.SyncBatchNorm(6),
    "instance": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
}


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3)
        self.block = nn.Sequential(norm, nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.conv(x)).mean(2))


def net(kind: str = "batch") -> nn.Module:
    torch.manual_seed(0)
    model = Net(NORMS[kind]())
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if ".adapters." not in n}


def train_a_little(model: nn.Module, name: str) -> None:
    model.train()
    optimiser = torch.optim.SGD(adapter_parameters(model, name).values(), lr=0.1)
    for seed in range(3):
        x = torch.randn(8, 3, 7, generator=torch.Generator().manual_seed(seed))
        with use(model, name):
            model(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("kind", NORMS)
def test_training_leaves_the_bases_statistics(kind: str) -> None:
    model = net(kind)
    before, x = bits(model), torch.randn(4, 3, 7)
    plain = copy.deepcopy(model).eval()(x)
    attach(model, LoRAConfig(rank=2, targets=["conv"]))
    train_a_little(model, "default")
    with use(model, None):
        torch.testing.assert_close(model(x), plain, atol=0, rtol=0)  # in training mode, too
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    detach(model, "default")
    norm = model.get_submodule("block.0")
    assert type(norm) is type(NORMS[kind]()) and norm.training
    model(x)
    assert not torch.equal(bits(model)["block.0.running_mean"], before["block.0.running_mean"])


@pytest.mark.parametrize("whole", ["block.0", "block"])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_an_adapters_own_statistics_train_and_travel(kind: str, whole: str, tmp_path: Path) -> None:
    base = net(kind)
    model, x = copy.deepcopy(base), torch.randn(4, 3, 7)
    attach(model, LoRAConfig(rank=2, targets=["conv"], whole_modules=[whole]))
    train_a_little(model, "default")
    before, value = bits(base), extract(model, "default")
    assert all(torch.equal(b, before[n]) for n, b in bits(model).items())
    own = value.extra["block.0.running_mean"]
    assert not torch.equal(own, before["block.0.running_mean"])
    assert int(value.extra["block.0.num_batches_tracked"]) == (3 if kind == "batch" else 0)
    model.eval()
    with use(model, "default"):
        expected = model(x)
    save_adapter(model, "default", tmp_path)
    again = copy.deepcopy(base).eval()
    load_adapter(again, tmp_path)
    with use(again, "default"):
        assert torch.equal(again(x), expected)
    theirs = peft_runs(peft_reads(base, tmp_path), x)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    merged, _ = merge(again, "default")
    torch.testing.assert_close(merged.eval()(x), expected, atol=1e-5, rtol=1e-5)
    assert type(merged.get_submodule("block.0")) is type(NORMS[kind]())
    kept = bits(again)
    merge_in_place(again, "default")
    torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-5)
    restore(again)
    assert all(torch.equal(b, kept[n]) for n, b in bits(again).items())


def test_a_norm_trained_whole_refuses_training_without_a_route() -> None:
    model = net()
    attach(model, LoRAConfig(rank=2, targets=[], whole_modules=["block.0"]))
    model.train()
    with pytest.raises(RouteError, match=r"'block\.0'"):
        model(torch.randn(4, 3, 7))


def test_copies_and_pickles_are_frozen_alike() -> None:
    model = net()
    attach(model, LoRAConfig(rank=2, targets=["conv"], whole_modules=["block.0"]))
    shake(adapter_parameters(model, "default").values())
    attach(model, LoRAConfig(rank=2, targets=["conv"]), "plain")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(4, 3, 7)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        before = bits(again)
        train_a_little(again, "plain")
        assert all(torch.equal(b, before[n]) for n, b in bits(again).items())
        again.eval(), model.eval()
        with use(again, "default"), use(model, "default"):
            assert torch.equal(again(x), model(x))
        assert "BatchNorm1d" in repr(again)
