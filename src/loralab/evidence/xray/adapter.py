"""The X-ray of an adapter: every pair's figures, and what else it changes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.adapters import Adapter, change_at, is_from_base
from loralab.errors import AdapterError
from loralab.evidence.xray.against import Overlap, overlap_with
from loralab.evidence.xray.figures import (
    BaseFigures,
    ModuleFigures,
    base_figures,
    spectrum_figures,
)
from loralab.evidence.xray.places import Place, places
from loralab.lowrank import SVD, Factors, factored_svd

DORA = (
    "DoRA: the spectrum is that of scale * B @ A, the change of direction; with its magnitudes the"
    " whole change is of full rank"
)
ALL_GROUPS = (
    "a grouped convolution whose A sees the channels of all groups, as its kernel cannot: nothing"
    " to compare with the base"
)


@runtime_checkable
class Weights(Protocol):
    """Stored weights, read one at a time (`loralab.models.StoredWeights`)."""

    def read(self, parameter: str) -> Tensor | None: ...


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is replaced whole, and how far it is from the base's.

    relative_change: `||own - base||_F / ||base||_F`, None where the base has no such tensor or is
    not at hand; `note` says which.
    """

    name: str
    role: str  # "whole module", "bias", "magnitude", "token rows"
    shape: tuple[int, ...]
    num_bytes: int
    relative_change: float | None
    note: str


@dataclass(frozen=True)
class XRay:
    """Everything found in one adapter, or in the difference of two checkpoints (rank None)."""

    name: str
    rank: int | None
    settings: Mapping[str, Any]
    modules: tuple[ModuleFigures, ...]
    others: tuple[OtherTensor, ...]
    base: str | None = None
    overlaps: tuple[Overlap, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and reports."""
        return asdict(self)


Tick = Callable[[int], None]


def xray(
    adapter: Adapter,
    *,
    name: str = "adapter",
    weights: Weights | None = None,
    base: str | None = None,
    against: Mapping[str, Adapter] | None = None,
    directions: bool = True,
    tick: Tick = lambda _: None,
) -> XRay:
    """Every figure of an adapter.

    weights: its base's, for the figures that need it; `directions=False` leaves out those that need
    the base's singular directions (intruders). against: other adapters to compare subspaces with.
    tick: called with the number of modules done. Raises `AdapterError` for an adapter that is not
    of this base, with everything that does not fit.
    """
    if weights is not None:
        _check_shapes(adapter, weights)
    found, svds = [], {}
    for done, (module, place) in enumerate(places(adapter.pairs).items(), start=1):
        svd = svds[module] = factored_svd(joined(adapter, module))
        found.append(_module(adapter, module, place, svd, weights, directions))
        tick(done)
    overlaps = [
        overlap_with(other_name, adapter, svds, other, joined)
        for other_name, other in (against or {}).items()
    ]
    config = adapter.config
    return XRay(
        name=name,
        rank=config.rank,
        settings={
            "rank": config.rank,
            "alpha": config.alpha,
            "scaling": config.scaling,
            "dora": config.dora,
            "modules": len(adapter.pairs),
            "parameters": adapter.num_parameters,
        },
        modules=tuple(found),
        others=tuple(_others(adapter, weights)),
        base=base,
        overlaps=tuple(overlaps),
    )


def joined(adapter: Adapter, module: str) -> Factors:
    """The pair as one product, also where a grouped convolution's B maps each group's share."""
    groups, (A, B) = adapter.layer(module).groups, adapter.pairs[module]
    if groups == 1:
        return adapter.factors(module)
    return Factors(A=A, B=torch.block_diag(*B.chunk(groups)), scale=adapter.scale(module))


def _module(
    adapter: Adapter,
    module: str,
    place: Place,
    svd: SVD,
    weights: Weights | None,
    directions: bool,
) -> ModuleFigures:
    A, B = (tensor.float() for tensor in adapter.pairs[module])
    norm_A, norm_B = (float(torch.linalg.matrix_norm(factor, 2)) for factor in (A, B))
    magnitude = adapter.magnitudes.get(module)
    notes = [DORA] if magnitude is not None else []
    base = None
    if adapter.layer(module).groups > 1:
        notes.append(ALL_GROUPS)
    elif weights is not None:
        weight = base_matrix(adapter, module, weights)
        if weight is None:
            notes.append("the base's files have no such weight: nothing to compare the change with")
        else:
            base = _against_base(adapter, module, svd, weight, directions)
    return ModuleFigures(
        module=module,
        block=place.block,
        kind=place.kind,
        layer_kind=adapter.layer(module).kind,
        shape=(svd.U.shape[0], svd.Vh.shape[1]),
        num_parameters=A.numel() + B.numel(),
        num_bytes=sum(t.numel() * t.element_size() for t in adapter.pairs[module]),
        rank=A.shape[0],
        scale=adapter.scale(module),
        norm_A=norm_A,
        norm_B=norm_B,
        balance=norm_B / norm_A if norm_A > 0 else None,
        base=base,
        notes=tuple(notes),
        **spectrum_figures(svd),
    )


def _against_base(
    adapter: Adapter, module: str, svd: SVD, weight: Float[Tensor, "out in"], directions: bool
) -> BaseFigures:
    change = change_at(adapter, module)
    adapted = torch.empty_like(weight)
    change.add(weight, adapted)
    outputs, magnitude_change = svd.U, None
    if change.magnitude is not None:
        plain = weight + (svd.U * svd.S) @ svd.Vh
        ratio = change.magnitude.float() / torch.linalg.vector_norm(plain, dim=1)
        magnitude_change = (float(ratio.min()), float(ratio.mean()), float(ratio.max()))
        outputs = torch.linalg.qr(ratio[:, None] * svd.U).Q
    return base_figures(
        svd,
        weight,
        adapted,
        outputs,
        directions=directions,
        magnitude_change=magnitude_change,
    )


def base_matrix(adapter: Adapter, module: str, weights: Weights) -> Float[Tensor, "out in"] | None:
    """The base weight of a pair as the matrix that its delta is added to, in fp32.

    None where the base's files have none (a tied output layer). Raises `AdapterError` where it is
    not the weight that the adapter was trained on.
    """
    name, stored = _stored(module, weights)
    if stored is None:
        return None
    if adapter.base is not None and is_from_base(adapter.base, name, stored) is False:
        raise AdapterError(
            f"the adapter was trained on another base: {name} has other values",
            "give the base it was trained on with --base.",
        )
    matrix, shape = stored.flatten(1), _shape(adapter, module)
    transposed = adapter.layer(module).kind == "embedding" or (
        adapter.facts.get("fan_in_fan_out") == "true"
    )
    if (transposed and tuple(matrix.mT.shape) == shape) or tuple(matrix.shape) != shape:
        matrix = matrix.mT
    return matrix.float().contiguous()


def _stored(module: str, weights: Weights) -> tuple[str, Tensor | None]:
    for last in ("weight", "in_proj_weight"):
        stored = weights.read(f"{module}.{last}")
        if stored is not None:
            return f"{module}.{last}", stored
    return f"{module}.weight", None


def _check_shapes(adapter: Adapter, weights: Weights) -> None:
    faults, missing = [], []
    for module in adapter.pairs:
        if adapter.layer(module).groups > 1:
            continue
        stored = _stored(module, weights)[1]
        if stored is None:
            missing.append(module)
            continue
        have, want = sorted(stored.flatten(1).shape), sorted(_shape(adapter, module))
        if have != want:
            faults.append(f"{module}: a delta of {want}, the base's weight is {have}")
    if len(missing) == len(adapter.pairs) > 0:
        faults.append(f"the base has none of its {len(missing)} modules (first: {missing[0]})")
    if faults:
        raise AdapterError(
            "\n  - ".join(["the adapter does not fit this base", *faults[:20]]),
            "give the base it was trained on with --base.",
        )


def _shape(adapter: Adapter, module: str) -> tuple[int, int]:
    A, B = adapter.pairs[module]
    return B.shape[0], A.shape[1]


def _others(adapter: Adapter, weights: Weights | None) -> list[OtherTensor]:
    found = []
    for name, tensor in adapter.extra.items():
        whole = any(name.startswith(f"{module}.") for module in adapter.whole_modules)
        role = "whole module" if whole else "bias"
        found.append(other_tensor(name, role, tensor, weights))
    for module, magnitude in adapter.magnitudes.items():
        note = "see the module's magnitude_change" if weights is not None else "needs the base"
        found.append(_other(f"{module}.magnitude", "magnitude", magnitude, None, note))
    for module, (indices, rows) in adapter.token_rows.items():
        table = weights.read(f"{module}.weight") if weights is not None else None
        inside = table is not None and int(indices.max()) < len(table)
        before = table[indices] if inside and table is not None else None
        found.append(other_tensor(module, "token rows", rows, weights, before))
    return found


def other_tensor(
    name: str,
    role: str,
    tensor: Tensor,
    weights: Weights | None,
    before: Tensor | None = None,
) -> OtherTensor:
    """A tensor that is replaced whole, against the base's where there is one."""
    if weights is None:
        return _other(name, role, tensor, None, "needs the base")
    before = weights.read(name) if before is None else before
    if before is None or before.shape != tensor.shape:
        return _other(name, role, tensor, None, "the base has none of this shape: it is new")
    size = float(torch.linalg.vector_norm(before.float()))
    distance = float(torch.linalg.vector_norm(tensor.float() - before.float()))
    return _other(name, role, tensor, distance / size if size > 0 else None, "")


def _other(name: str, role: str, tensor: Tensor, change: float | None, note: str) -> OtherTensor:
    size = tensor.numel() * tensor.element_size()
    return OtherTensor(name, role, tuple(tensor.shape), size, change, note)
