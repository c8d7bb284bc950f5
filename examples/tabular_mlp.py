"""LoRA on a small MLP: scikit-learn's breast-cancer table, with each column's sign turned.

An adapter needs no transformer: any `nn.Module` with linear layers takes one.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from loralab.adapters import LoRAConfig, attach, load_adapter, save_adapter, use


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rate: float) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).argmax(1) == y).float().mean().item()


torch.manual_seed(0)
table = load_breast_cancer()
x = torch.tensor(table.data, dtype=torch.float32)
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(table.target)
order = torch.randperm(len(x))
held_out, half = order[:150], order[150:]
model = network()
train(model, x[half], y[half], 1e-3)  # the base: full training on the first clinic
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

shifted = -x  # the second clinic writes each column with the other sign
before = accuracy(model, shifted[held_out], y[held_out])
attach(model, LoRAConfig(rank=4, alpha=8), "clinic", head="frozen")  # freezes the base
with use(model, "clinic"):
    train(model, shifted[half], y[half], 1e-2)
    after = accuracy(model, shifted[held_out], y[held_out])
    answers = model(shifted[held_out])

with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, "clinic", folder)
    num_bytes = Path(folder, "adapter_model.safetensors").stat().st_size
    fresh = network()
    fresh.load_state_dict(base)
    load_adapter(fresh, folder, "clinic")
with use(fresh, "clinic"):
    difference = (fresh(shifted[held_out]) - answers).abs().max().item()
print(f"before {before:.3f}, after {after:.3f}; {num_bytes} bytes; differs by {difference:.1e}")
