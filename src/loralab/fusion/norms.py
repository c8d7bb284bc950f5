"""Norms whose backward pass needs nothing but their input."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.fusion.proof import agrees
from loralab.native import training as native

Rows = Float[Tensor, "rows width"]


@runtime_checkable
class Norm(Protocol):
    """A norm of rows, forward and backward."""

    def forward(self, x: Rows) -> tuple[Rows, Tensor | None]:
        """The normed rows, and what `backward` needs beside `x`."""
        ...

    def backward(
        self,
        g: Rows,
        x: Rows,
        kept: Tensor | None,
        beside: Rows | None = None,
    ) -> Rows:
        """The gradient of `x` for the gradient `g` of the normed rows, plus `beside`."""
        ...


@dataclass(frozen=True)
class Norms:
    """The norms of a block: before attention and MLP, and those that only some models have."""

    attention: Norm
    mlp: Norm
    queries: Norm | None = None
    keys: Norm | None = None
    attended: Norm | None = None  # of what attention adds to its input
    mapped: Norm | None = None  # of what the MLP adds to its input

    @property
    def only_before(self) -> bool:
        """Whether there are none but those before attention and MLP."""
        return not (self.queries or self.keys or self.attended or self.mapped)


@dataclass(frozen=True)
class RMSNorm:
    """`gain * x / sqrt(mean(x^2) + epsilon)`, the mean in fp32 (1910.07467)."""

    gain: Float[Tensor, " width"]
    epsilon: float

    def forward(self, x: Rows) -> tuple[Rows, Float[Tensor, "rows 1"]]:
        if native.covers(x, self.gain):
            return native.norm(x, self.gain, self.epsilon)
        width = x.shape[-1]
        power = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square_()
        inverse = power.div_(width).add_(self.epsilon).rsqrt_()
        return (x.to(inverse.dtype) * inverse).to(x.dtype).mul_(self.gain), inverse

    def backward(
        self,
        g: Rows,
        x: Rows,
        kept: Float[Tensor, "rows 1"] | None,
        beside: Rows | None = None,
    ) -> Rows:
        assert kept is not None
        if native.covers(x, g, *(() if beside is None else (beside,)), self.gain):
            return native.norm_backward(g, x, kept, self.gain, beside)
        scaled = (g * self.gain).to(kept.dtype)
        normed = x.to(kept.dtype) * kept
        along = (scaled * normed).mean(-1, keepdim=True)
        return _plus(scaled.addcmul_(normed, along, value=-1).mul_(kept).to(x.dtype), beside)


@dataclass(frozen=True)
class OtherNorm:
    """Any other norm: its module runs again in the backward pass."""

    module: nn.Module

    def forward(self, x: Rows) -> tuple[Rows, None]:
        return self.module(x), None

    def backward(
        self,
        g: Rows,
        x: Rows,
        kept: Tensor | None,
        beside: Rows | None = None,
    ) -> Rows:
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            return _plus(torch.autograd.grad(self.module(again), again, g)[0], beside)


@dataclass(frozen=True)
class HeadNorm:
    """A norm of each head by itself, on rows of many heads."""

    norm: Norm
    head_size: int

    def forward(self, x: Rows) -> tuple[Rows, Tensor | None]:
        normed, kept = self.norm.forward(self._heads(x))
        return normed.view(x.shape), kept

    def backward(
        self,
        g: Rows,
        x: Rows,
        kept: Tensor | None,
        beside: Rows | None = None,
    ) -> Rows:
        return _plus(self.norm.backward(self._heads(g), self._heads(x), kept).view(x.shape), beside)

    def _heads(self, rows: Rows) -> Float[Tensor, "_ head_size"]:
        return rows.reshape(-1, self.head_size)


def normed(norm: Norm | None, rows: Rows) -> tuple[Rows, Rows | None]:
    """The normed rows, and what `normed_backward` needs; the rows as they are without a norm."""
    return (rows, None) if norm is None else (norm.forward(rows)[0], rows)


def normed_backward(
    norm: Norm | None,
    g: Rows,
    rows: Rows | None,
) -> Rows:
    """The gradient of the rows that `normed` was given."""
    if norm is None or rows is None:
        return g
    return norm.backward(g, rows, norm.forward(rows)[1])


def norm_of(module: nn.Module, x: Rows) -> Norm:
    """The norm that `module` is, tried on the rows `x`."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if isinstance(weight, Tensor) and epsilon is not None:
        wanted = module(x)
        for gain in (weight.detach(), 1 + weight.detach()):
            norm = RMSNorm(gain, epsilon)
            if agrees(norm.forward(x)[0], wanted):
                return norm
    return OtherNorm(module)


def _epsilon(module: nn.Module) -> float | None:
    named = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((float(value) for value in named if isinstance(value, int | float)), None)


def _plus(value: Tensor, beside: Tensor | None) -> Tensor:
    return value if beside is None else value.add_(beside)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
