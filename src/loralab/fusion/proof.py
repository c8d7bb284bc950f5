"""Whether a fused form and the module it stands for give the same."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Relative errors (2-norms) that rounding can cause; another formula errs by more."""


def agrees(got: Tensor, wanted: Tensor) -> bool:
    """Whether `got` is `wanted` but for rounding. Without values (meta, fake) shapes decide."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if got.device.type == "meta" or isinstance(got, FakeTensor):
        return True
    error = (got.double() - wanted.double()).norm()
    return bool(error <= _TOLERANCES.get(got.dtype, 0.0) * wanted.double().norm())
