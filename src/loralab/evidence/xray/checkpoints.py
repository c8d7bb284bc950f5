"""The X-ray of the difference of two whole checkpoints, weight by weight."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loralab.errors import AdapterError
from loralab.evidence.xray.adapter import OtherTensor, Tick, XRay, other_tensor
from loralab.evidence.xray.figures import ModuleFigures, base_figures, spectrum_figures
from loralab.evidence.xray.places import Place, places
from loralab.lowrank import dense_svd

FULL_RANK = "a change of full rank: every new direction counts as the change's own"


@runtime_checkable
class NamedWeights(Protocol):
    """Stored weights whose names are known (`loralab.models.StoredWeights`)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def read(self, parameter: str) -> Tensor | None: ...


def xray_difference(
    tuned: NamedWeights,
    weights: NamedWeights,
    *,
    name: str = "checkpoint",
    base: str | None = None,
    directions: bool = True,
    tick: Tick = lambda _: None,
) -> XRay:
    """Every figure of `tuned - base`, as if it were an adapter of full rank.

    Matrices that changed become modules; vectors, and tensors that the base lacks, are listed
    beside them. Raises `AdapterError` where the two have no tensor in common.
    """
    modules: list[ModuleFigures] = []
    others: list[OtherTensor] = []
    common = 0
    where = places(tuned.names)
    for done, parameter in enumerate(where, start=1):
        after, before = tuned.read(parameter), weights.read(parameter)
        tick(done)
        if after is None:
            continue
        if before is None or before.shape != after.shape:
            others.append(other_tensor(parameter, "whole module", after, weights))
            continue
        common += 1
        delta = after.float() - before.float()
        if not bool(delta.any()):
            continue
        if delta.ndim < 2:
            others.append(other_tensor(parameter, "vector", after, weights))
            continue
        modules.append(_module(parameter, where[parameter], delta, before.float(), directions))
    if common == 0:
        raise AdapterError(
            "the checkpoint and the base have no tensor in common",
            "give the base that the checkpoint was tuned from with --base.",
        )
    settings = {
        "modules": len(modules),
        "parameters": sum(module.num_parameters for module in modules),
        "unchanged": common - len(modules) - sum(other.role == "vector" for other in others),
    }
    return XRay(name, None, settings, tuple(modules), tuple(others), base)


def _module(
    parameter: str, place: Place, delta: Tensor, weight: Tensor, directions: bool
) -> ModuleFigures:
    matrix, before = delta.flatten(1), weight.flatten(1)
    svd = dense_svd(matrix)
    outputs = torch.linalg.qr(svd.U[:, : svd.numerical_rank]).Q
    found = base_figures(svd, before, before + matrix, outputs, directions=directions)
    return ModuleFigures(
        module=parameter.removesuffix(".weight"),
        block=place.block,
        kind=place.kind.removesuffix(".weight"),
        layer_kind=f"{delta.ndim}-dimensional",
        shape=(matrix.shape[0], matrix.shape[1]),
        num_parameters=matrix.numel(),
        num_bytes=4 * matrix.numel(),
        base=found,
        notes=(FULL_RANK,),
        **spectrum_figures(svd),
    )
