"""What has no sum: checked as a whole before adapters are combined."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.fingerprint import check_fingerprint
from loralab.adapters.mixing import some, tensors_of
from loralab.errors import AdapterError
from loralab.lowrank import Number


@dataclass(frozen=True)
class Plan:
    """How adapters are to be combined; see `algebra.combination`. linear: by a plain sum."""

    method: str
    rank: int | None
    energy: Number | None
    density: Number | None
    seed: int
    linear: bool


def is_itself(adapters: Sequence[Adapter], weights: Sequence[Number], plan: Plan) -> bool:
    """Whether the sum is one of the adapters as it is."""
    alone = len(adapters) == 1 and weights[0] == 1 and plan.linear
    return alone and plan.rank is None and plan.energy is None


def check_combination(
    adapters: Sequence[Adapter],
    weights: Sequence[Number],
    plan: Plan,
    base: nn.Module | None,
) -> None:
    """Raises `AdapterError` that lists everything that has no sum."""
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters but {len(weights)} weights",
            "give at least one adapter and one weight for each.",
        )
    faults = [f"weight {weight} is not finite" for weight in weights if not abs(weight) < 1e300]
    if plan.density is not None and plan.linear:
        faults.append(f"method {plan.method!r} has no density")
    faults += _base_faults(adapters)
    faults += _shape_faults(adapters)
    faults += _zero_sum_faults(adapters, weights, base)
    if any(a.magnitudes for a in adapters) and not is_itself(adapters, weights, plan):
        faults += _dora_faults(adapters, plan, base)
    if faults:
        raise AdapterError(
            "\n  - ".join([f"cannot combine: {len(faults)} fault(s)", *faults]),
            "mend them all, or keep the adapters apart and mix them with a route:"
            ' `loralab.use(model, {"a": 0.7, "b": 0.3})`.',
        )


def _base_faults(adapters: Sequence[Adapter]) -> list[str]:
    known = [adapter.base for adapter in adapters if adapter.base]
    for other in known[1:]:
        try:
            check_fingerprint(known[0], other)
        except AdapterError as error:
            return [error.cause]
    return []


def _shape_faults(adapters: Sequence[Adapter]) -> list[str]:
    shapes: dict[str, set[tuple[int, ...]]] = {}
    kinds: dict[str, set[tuple[object, ...]]] = {}
    for adapter in adapters:
        for module, (A, B) in adapter.pairs.items():
            shapes.setdefault(f"delta of {module!r}", set()).add((B.shape[0], A.shape[1]))
            kinds.setdefault(module, set()).add(adapter.layer(module).form)
        for name, tensor in adapter.extra.items():
            shapes.setdefault(f"tensor {name!r}", set()).add(tuple(tensor.shape))
        for module, (_, rows) in adapter.token_rows.items():
            shapes.setdefault(f"token rows of {module!r}", set()).add(tuple(rows.shape[1:]))
    faults = [
        f"{name} has different shapes: " + ", ".join(str(shape) for shape in sorted(found))
        for name, found in shapes.items()
        if len(found) > 1
    ]
    return faults + [
        f"{module!r} is a different kind of layer in different adapters"
        for module, found in kinds.items()
        if len(found) > 1
    ]


def _zero_sum_faults(
    adapters: Sequence[Adapter], weights: Sequence[Number], base: nn.Module | None
) -> list[str]:
    """Whole tensors whose weighted mean would divide by zero (a - b without the base)."""
    known = tensors_of(base)
    faults = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.extra):
        own = [w for a, w in zip(adapters, weights, strict=True) if name in a.extra]
        if name not in known and len(own) > 1 and abs(sum(own)) < 1e-12:
            faults.append(f"{name!r}: weights that sum to zero have no mean; give the base model")
    return faults


def _dora_faults(adapters: Sequence[Adapter], plan: Plan, base: nn.Module | None) -> list[str]:
    modules = sorted({module for adapter in adapters for module in adapter.magnitudes})
    cause = f"DoRA at {some(modules)}: its delta is of full rank and depends on the base"
    if not plan.linear:
        return [f"{cause}; only method 'linear' can approximate it"]
    if base is None or (plan.rank is None and plan.energy is None):
        return [f"{cause}; give `base` and a rank or energy to approximate it, or merge it"]
    owners = dict(base.named_modules())
    return [f"the base has no module {name!r}" for name in modules if name not in owners]
