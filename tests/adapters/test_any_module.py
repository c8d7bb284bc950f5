"""Modules that no list knows: an adapter works on them or they are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    load_adapter,
    merge,
    save_adapter,
    use,
)
from loralab.config import MethodSection, TrainingSection
from loralab.errors import AdapterError, TargetError, TrainingError
from loralab.training import fit, prepare


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(4, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x)[0])


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class ReadPast(nn.Module):
    """Reads its layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


class Odd(nn.Module):
    """Convolutions apart by groups, gaps and padding; an embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Embedding(11, 8)
        self.apart = nn.Conv1d(8, 16, 3, groups=8, padding=2, dilation=2)
        self.around = nn.Conv1d(16, 8, 3, groups=2, padding="same", padding_mode="circular")
        self.say = nn.Linear(8, 11, bias=False)
        self.say.weight = self.read.weight
        self.also_around = self.around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.around(self.apart(self.read(x.long()).mT).relu())
        return self.say(self.also_around(torch.cat([found, found], 1)).mT)


def swin() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 4}
    config = SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2], num_labels=3)
    model = SwinForImageClassification(config)
    nn.init.normal_(model.classifier.weight)
    return model


def conv1d() -> nn.Module:
    body = nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(24, 2))


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 2))


def drawn(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """The model with an adapter whose B is not zero."""
    attach(model, config, "style", head="frozen")
    torch.manual_seed(1)
    for parameter in adapter_parameters(model, "style").values():
        nn.init.normal_(parameter, std=0.3)
    return model


def answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    said: Any = model(x)
    return said if isinstance(said, torch.Tensor) else said.logits


@pytest.mark.parametrize(
    ("build", "shape", "targets", "num_pairs"),
    [
        (Recurrent, (2, 5, 4), "all-linear", 1),
        (swin, (2, 3, 16, 16), "all-linear", 13),
        (conv1d, (2, 3, 16), ["0.0", "0.2", "2"], 3),
        (conv3d, (2, 1, 6, 6, 6), ["0", "3"], 2),
        (Odd, (2, 7), ["read", "apart", "around", "say"], 4),
    ],
)
def test_an_adapter_works_saves_and_merges(
    tmp_path: Path, build: Callable[[], nn.Module], shape: Any, targets: Any, num_pairs: int
) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape).abs()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = answer(model, x)
    drawn(model, LoRAConfig(rank=2, alpha=4, targets=targets))
    assert len(adapter_parameters(model, "style")) == 2 * num_pairs
    with use(model, "style"):
        found = answer(model, x)
    assert (found - base).abs().max() > 1e-2
    found.square().sum().backward()
    gradients = [p.grad for p in adapter_parameters(model, "style").values()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    save_adapter(model, "style", tmp_path / "adapter", portable=build is not Odd)
    fresh = build().eval()
    fresh.load_state_dict(state)
    load_adapter(fresh, tmp_path / "adapter", "again")
    with use(fresh, "again"):
        assert torch.equal(answer(fresh, x), found)
    torch.testing.assert_close(answer(merge(model, "style")[0], x), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        (Recurrent(), ["body"], "'body' is a LSTM, which has no low-rank form"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), ["0"], "'0' is a ConvTranspose2d"),
        (nn.Sequential(nn.Bilinear(3, 4, 5)), ["0"], "'0' is a Bilinear"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "all-linear", "but its head; of Conv2d give the names"),
        (nn.Linear(3, 4), "all-linear", "the model is itself a Linear; put it into nn.Sequential"),
    ],
)
def test_what_has_no_low_rank_form_is_refused_by_name(
    model: nn.Module, targets: Any, said: str
) -> None:
    with pytest.raises(TargetError, match=said):
        attach(model, LoRAConfig(rank=2, targets=targets))


def test_lazy_modules_are_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"without a size yet: 0\.weight, 0\.bias"):
        attach(nn.Sequential(nn.LazyLinear(3)), LoRAConfig(rank=2))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed from other"),
        (lambda: Scaled(4, 4), "Scaled's forward does more than multiply with its weight"),
    ],
)
def test_a_merge_that_would_change_the_answer_is_refused_by_name(
    layer: Callable[[], nn.Module], said: str
) -> None:
    model = drawn(nn.Sequential(layer(), nn.Linear(4, 2)), LoRAConfig(rank=2))
    with pytest.raises(AdapterError, match=f"0: .*{said}") as raised:
        merge(model, "style")
    assert "keep the adapter separate" in raised.value.next_step
    plain = drawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoRAConfig(rank=2))
    merge(plain, "style")


def test_no_rows_are_rows() -> None:
    """An expert that gets no token."""
    model = drawn(nn.Sequential(nn.Linear(4, 3)), LoRAConfig(rank=2))
    with use(model, "style"):
        found = model(torch.ones(0, 4))
    assert found.shape == (0, 3)
    found.sum().backward()


def test_a_model_that_reads_weights_past_their_modules_is_not_trained(tmp_path: Path) -> None:
    class Task:
        def __init__(self, model: nn.Module, route: str | None) -> None:
            self.model = model

        def nll_sum(self, rows: Any) -> torch.Tensor:
            return self.model(torch.ones(len(rows), 4)).square().sum()

        def answers(self, rows: Any) -> list[Any]:
            return []

    rows = [_Row()]
    method, training = MethodSection(rank=2), TrainingSection(device="cpu")
    trainable = prepare(ReadPast(), method, training, task=Task)
    with pytest.raises(TrainingError, match="the loss depends on no trained tensor"):
        list(fit(trainable, rows, (), tmp_path))


class _Row:
    id = group = "row"
    label = None
    num_tokens = num_targets = 1

    def content(self) -> list[Any]:
        return []
