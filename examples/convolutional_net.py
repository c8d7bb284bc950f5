"""LoRA on a convolutional net: digits in negative, from a net for digits. BatchNorm's running
statistics belong to the data seen: `whole_modules` gives the adapter its own."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from loralab.adapters import LoRAConfig, attach, load_adapter, save_adapter, use


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * 16, 10),
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rate: float) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for rows in torch.randperm(len(x)).repeat(4).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).argmax(1) == y).float().mean().item()


torch.manual_seed(0)
images, y = map(torch.tensor, load_digits(return_X_y=True))
x = images.float().view(-1, 1, 8, 8) / 16
model = network()
train(model.train(), x[:1400], y[:1400], 1e-2)
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
negative = 1 - x
before = accuracy(model.eval(), negative[1400:], y[1400:])
config = LoRAConfig(rank=4, alpha=8, targets=["0", "4", "8"], whole_modules=["1", "5"])
attach(model, config, "negative", head="frozen")
with use(model, "negative"):
    train(model.train(), negative[:1400], y[:1400], 1e-2)
    after = accuracy(model.eval(), negative[1400:], y[1400:])
    answers = model(negative[1400:])
assert torch.equal(model[1].running_mean, base["1.running_mean"])  # the base's own stay
with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, "negative", folder)
    num_bytes = Path(folder, "adapter_model.safetensors").stat().st_size
    fresh = network().eval()
    fresh.load_state_dict(base)
    load_adapter(fresh, folder, "negative")
with use(fresh, "negative"):
    difference = (fresh(negative[1400:]) - answers).abs().max().item()
print(f"before {before:.3f}, after {after:.3f}; {num_bytes} bytes; differs by {difference:.1e}")
