"""Sums of tensors that an adapter carries whole: heads, norms, biases, token rows.

With the base at hand such a tensor is `base + sum w (own - base)`, as in a route's mix; without it
there is only the weighted mean, which a note states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.lowrank import Number


def mix_tensors(
    adapters: Sequence[Adapter],
    weights: Sequence[Number],
    base: nn.Module | None,
    notes: list[str],
) -> dict[str, Tensor]:
    known = tensors_of(base)
    mixed, averaged = {}, []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.extra):
        own = [
            (a.extra[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.extra
        ]
        if not own[0][0].is_floating_point():
            mixed[name] = max(own, key=lambda item: abs(item[1]))[0]  # a counter has no mean
        elif name in known:
            mixed[name] = _around(known[name], own)
        else:
            mixed[name] = _mean(own)
            averaged.append(name)
    if averaged:
        notes.append(
            f"{some(averaged)}: the weighted mean of the adapters' own tensors, as the base"
            " is not at hand (with it, their deltas from the base are added up)"
        )
    return mixed


def mix_rows(
    adapters: Sequence[Adapter],
    weights: Sequence[Number],
    base: nn.Module | None,
    notes: list[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """The token rows of the sum: every row that any of the adapters replaces."""
    known, averaged = tensors_of(base), []
    mixed: dict[str, tuple[Tensor, Tensor]] = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.token_rows):
        by_row: dict[int, list[tuple[Tensor, Number]]] = {}
        for adapter, weight in zip(adapters, weights, strict=True):
            for row, value in zip(*adapter.token_rows.get(module, ((), ())), strict=True):
                by_row.setdefault(int(row), []).append((value, weight))
        table = known.get(f"{module}.weight")
        if table is None:
            averaged.append(module)
        values = [
            _mean(own) if table is None else _around(table[row], own)
            for row, own in sorted(by_row.items())
        ]
        mixed[module] = torch.tensor(sorted(by_row)), torch.stack(values)
    if averaged:
        notes.append(f"token rows of {some(averaged)}: the weighted mean, base not at hand")
    return mixed


def _around(base: Tensor, own: Sequence[tuple[Tensor, Number]]) -> Tensor:
    start = base.detach().float()
    return start + sum(weight * (tensor.float() - start) for tensor, weight in own)


def _mean(own: Sequence[tuple[Tensor, Number]]) -> Tensor:
    total = sum(weight for _, weight in own)
    if len(own) == 1:
        return own[0][0]
    return torch.stack([tensor.float() * (weight / total) for tensor, weight in own]).sum(0)


def tensors_of(model: nn.Module | None) -> dict[str, Tensor]:
    """The model's parameters and buffers under all their full names; none without a model."""
    if model is None:
        return {}
    named = [*model.named_parameters(remove_duplicate=False)]
    return {**dict(named), **dict(model.named_buffers(remove_duplicate=False))}


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more
