"""Modules whose weight, changed by an adapter, would not do what the adapter does beside it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.doubles import plain_copy
from loralab.adapters.layers import TRANSPOSED, path_of
from loralab.errors import AdapterError

_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
_TOLERANCE = 1e-3


def check_weights(
    weights: Iterable[tuple[nn.Module, str, str]], stored: Mapping[str, Tensor]
) -> None:
    """Raises `AdapterError` that names every module an adapter cannot be merged into.

    weights: (module, its path, the full name of its weight). stored: the model's own tensors.

    A parametrized weight (weight norm) is stored in parts. A linear layer with a forward of its own
    is tried: its answer must grow by what the weight grows by.
    """
    faults = []
    for module, path, name in weights:
        if name not in stored:
            faults.append(f"{path}: its weight is computed from other tensors")
        elif _is_linear(module) and not _adds_up(module):
            kind = getattr(module, "base_class", type(module)).__name__
            faults.append(f"{path}: {kind}'s forward does more than multiply with its weight")
    if faults:
        raise AdapterError("; ".join(faults), "keep the adapter separate (`loralab.use`).")


def _is_linear(module: nn.Module) -> bool:
    forward = getattr(module, "base_class", type(module)).forward
    return isinstance(module, nn.Linear | Conv1D) and forward not in _PLAIN_FORWARDS


def _adds_up(module: nn.Module) -> bool:
    """Whether an answer with twice the weight is further off by the weight's own product."""
    plain = plain_copy(module).eval().float()
    weight = plain.get_parameter("weight")
    matrix = weight if path_of(module) is not TRANSPOSED else weight.T
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, matrix.shape[1], generator=draw).to(weight.device)
    with torch.no_grad():
        grown = x @ matrix.T
        try:
            before = plain(x)
            weight.mul_(2)
            after = plain(x)
        except (TypeError, ValueError, RuntimeError):  # it takes something else
            return False
    return torch.allclose(after - before, grown, rtol=_TOLERANCE, atol=_TOLERANCE)
