"""LoRA on a vision transformer of transformers: digits upside down, from a model for digits."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from loralab.adapters import LoRAConfig, attach, load_adapter, save_adapter, use


def network() -> nn.Module:
    sizes = {"hidden_size": 48, "intermediate_size": 96}
    blocks = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes, **blocks)
    ).eval()


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rate: float, epochs: int) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for rows in torch.randperm(len(x)).repeat(epochs).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]).logits, y[rows]).backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).logits.argmax(1) == y).float().mean().item()


torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
y = torch.tensor(digits.target)
model = network()
train(model, x[:1400], y[:1400], 3e-3, epochs=5)
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

flipped = x.flip(-2)
before = accuracy(model, flipped[1400:], y[1400:])
attach(model, LoRAConfig(rank=8, alpha=16), "flipped", head="frozen")  # every linear layer
with use(model, "flipped"):
    train(model, flipped[:1400], y[:1400], 5e-3, epochs=5)
    after = accuracy(model, flipped[1400:], y[1400:])
    answers = model(flipped[1400:]).logits

with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, "flipped", folder)
    num_bytes = Path(folder, "adapter_model.safetensors").stat().st_size
    fresh = network()
    fresh.load_state_dict(base)
    load_adapter(fresh, folder, "flipped")
with use(fresh, "flipped"):
    difference = (fresh(flipped[1400:]).logits - answers).abs().max().item()
print(f"before {before:.3f}, after {after:.3f}; {num_bytes} bytes; differs by {difference:.1e}")
