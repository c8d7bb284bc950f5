"""Gated activations, forward and backward, that keep nothing but their inputs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from loralab.fusion.proof import agrees
from loralab.native import training as native

Rows = Float[Tensor, "rows width"]


@dataclass(frozen=True)
class Gate:
    """`act(gate) * up`; kernel: the number of act in `native.ACTIVATIONS`, None for others."""

    activation: nn.Module
    kernel: int | None = None

    def forward(self, gate: Rows, up: Rows) -> Rows:
        """The gated rows."""
        if self.kernel is not None and native.covers(gate, up):
            return native.gated(gate, up, self.kernel)
        return self.activation(gate).mul_(up)

    def backward(self, g: Rows, gate: Rows, up: Rows) -> tuple[Rows, Rows]:
        """The gradients of gate and up for the gradient `g` of the gated rows, which is used up."""
        if self.kernel is not None and native.covers(g, gate, up):
            return native.gated_backward(g, gate, up, self.kernel)
        with torch.enable_grad():
            again = gate.detach().requires_grad_()
            activated = self.activation(again)
        grad_up = g * activated.detach()
        (grad_gate,) = torch.autograd.grad(activated, again, g.mul_(up))
        return grad_gate, grad_up


def gate_of(activation: nn.Module) -> Gate:
    """The gate with that activation, which is known by what it does to some numbers."""
    if next(activation.parameters(), None) is not None:
        return Gate(activation)
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.linspace(-6, 6, 96, dtype=torch.float64)
        wanted = activation(x)
        made = {name: act(x) for name, act in native.ACTIVATION_FUNCTIONS.items()}
    known = (name for name, each in made.items() if agrees(each, wanted))
    name = next(known, None)
    return Gate(activation, None if name is None else native.ACTIVATIONS.index(name))
