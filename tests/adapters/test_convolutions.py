"""Convolutions that PEFT applies adapters to in another way: converted exactly, or refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_reads, peft_runs, peft_writes, shake
from torch import Tensor, nn

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    content_hash,
    extract,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
    use,
)
from loralab.errors import AdapterError


class Net(nn.Module):
    """One convolution to adapt, then a mean over positions."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.end = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(x).square().flatten(2).mean(2))


GROUPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "a group a channel": (lambda: nn.Conv1d(6, 6, 3, groups=6, stride=2), (2, 6, 9)),
    "cubes": (lambda: nn.Conv3d(3, 6, (1, 2, 2), groups=3, bias=False), (2, 3, 3, 4, 4)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, groups=2), (2, 4, 3, 3)),
    "same": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), (2, 4, 7)),
}


def net(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(make()).eval()


def adapted(base: nn.Module, **settings: Any) -> nn.Module:
    model = copy.deepcopy(base)
    config = {"rank": 2, "alpha": 0.3, "targets": ["conv", "end"]} | settings
    attach(model, LoRAConfig(**config))
    shake(adapter_parameters(model, "default").values())
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    with use(model, "default"):
        return model(x)


@pytest.mark.parametrize("scaling", ["alpha/rank", "alpha/sqrt(rank)"])
@pytest.mark.parametrize("kind", GROUPED)
def test_ours_goes_to_peft_and_comes_back_as_it_was(
    kind: str, scaling: str, tmp_path: Path
) -> None:
    make, shape = GROUPED[kind]
    base, x = net(make), torch.randn(shape)
    model = adapted(base, scaling=scaling)
    save_adapter(model, "default", tmp_path)
    expected = run(model, x)
    theirs = peft_runs(peft_reads(base, tmp_path), x)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    value, again = extract(model, "default"), read_adapter(tmp_path)
    assert content_hash(again) == content_hash(value)
    assert again.scale("conv") == value.scale("conv")
    for mine, found in zip(value.pairs["conv"], again.pairs["conv"], strict=True):
        assert torch.equal(mine, found)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert torch.equal(run(loaded, x), expected)
    merged, _ = merge(loaded, "default")
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GROUPED)
def test_theirs_is_read_and_written_again(kind: str, tmp_path: Path) -> None:
    make, shape = GROUPED[kind]
    base, x = net(make), torch.randn(shape)
    theirs = peft_writes(base, tmp_path / "a", r=12, lora_alpha=5, target_modules=["conv", "end"])
    expected = peft_runs(theirs, x)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(run(model, x), expected, atol=1e-5, rtol=1e-5)
    save_adapter(model, "default", tmp_path / "b")
    again = peft_runs(peft_reads(base, tmp_path / "b"), x)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match=r"'conv'.*channels of all groups[\s\S]*separate"):
        merge(model, "default")


BEYOND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "dilated": (lambda: nn.Conv2d(3, 6, 3, dilation=2), (2, 3, 7, 7), "dilation (2, 2)"),
    "circular": (
        lambda: nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"),
        (2, 3, 7),
        "'circular'",
    ),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_peft_would_apply_otherwise_is_saved_for_us_alone(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, shape, words = BEYOND[kind]
    base, x = net(make), torch.randn(shape)
    model = adapted(base)
    assert f"conv: PEFT {'applies' if kind == 'dilated' else 'pads'}" in caplog.text
    with pytest.raises(AdapterError) as caught:
        save_adapter(model, "default", tmp_path / "peft")
    assert words in caught.value.cause and "conv: PEFT" in caught.value.cause
    assert "portable=False" in caught.value.next_step
    assert not (tmp_path / "peft").exists()
    save_adapter(model, "default", tmp_path / "ours", portable=False)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / "ours")
    assert torch.equal(run(loaded, x), run(model, x))
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft_reads(base, tmp_path / "ours")
    merged, _ = merge(loaded, "default")
    torch.testing.assert_close(merged(x), run(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BEYOND)
def test_what_peft_trained_there_is_refused(kind: str, tmp_path: Path) -> None:
    make, _, words = BEYOND[kind]
    base = net(make)
    peft_writes(base, tmp_path, r=2, target_modules=["conv"])
    with pytest.raises(AdapterError) as caught:
        load_adapter(base, tmp_path)
    assert words in caught.value.cause


def test_grouped_dora_is_ours_alone(tmp_path: Path) -> None:
    make, shape = GROUPED["two groups"]
    base, x = net(make), torch.randn(shape)
    model = adapted(base, dora=True)
    with pytest.raises(AdapterError, match="no DoRA for grouped convolutions"):
        save_adapter(model, "default", tmp_path)
    save_adapter(model, "default", tmp_path, portable=False)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert torch.equal(run(loaded, x), run(model, x))


def test_groups_that_apply_the_same_are_found_without_our_metadata(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = net(GROUPED["two groups"][0])
    model = adapted(base)
    save_adapter(model, "default", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    again = read_adapter(tmp_path)
    assert again.pairs["conv"][0].shape == (2, 18)
    assert again.scale("conv") == pytest.approx(0.15)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["rank_pattern"] == {"^conv": 4}
