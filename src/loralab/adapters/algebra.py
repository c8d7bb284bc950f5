"""Sums of adapters: through the factors, exact where mathematics lets it be, stated where not.

Every pair is taken at its own rank, alpha and scaling, so rsLoRA, patterns and mixed ranks add up
as what they do to the model. The result is a plain adapter (`alpha/rank`).
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab import lowrank
from loralab.adapters.adapter import Adapter, Layer
from loralab.adapters.combining_faults import Plan, check_combination, is_itself
from loralab.adapters.layers import path_of
from loralab.adapters.mixing import mix_rows, mix_tensors
from loralab.adapters.settings import LoRAConfig
from loralab.errors import AdapterError, nearest
from loralab.lowrank import Approximation, Factors, Number, RowStream

logger = logging.getLogger("loralab")


@dataclass(frozen=True, eq=False)
class Combination:
    """The combined adapter, and how far it is from what was asked for.

    errors: module -> `||wanted - delta||_F / ||wanted||_F`, for modules where it is not zero.
    notes: what a reader should know of tensors that have no exact sum.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    notes: tuple[str, ...]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[Number],
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: Number | None = None,
    density: Number | None = None,
    base: nn.Module | None = None,
    seed: int = 0,
) -> Adapter:
    """`combination(...).adapter`; errors and notes go to the log."""
    found = combination(
        adapters,
        weights,
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        base=base,
        seed=seed,
    )
    if found.errors:
        module = max(found.errors, key=lambda name: found.errors[name])
        logger.warning(
            "combined with an error of at most %.2g of a module's delta (%s)",
            found.errors[module],
            module,
        )
    for note in found.notes:
        logger.warning("%s", note)
    return found.adapter


def combination(
    adapters: Sequence[Adapter],
    weights: Sequence[Number],
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: Number | None = None,
    density: Number | None = None,
    base: nn.Module | None = None,
    seed: int = 0,
) -> Combination:
    """`sum_i weight_i * adapter_i` as one adapter.

    method: "linear" (also called "task-arithmetic"), exact: the ranks add up, and `rank` or
        `energy` then cuts to the best of that size; "ties", "dare", "dare-ties": elementwise,
        brought back to `rank` or `energy` (default: the sum of the ranks); "knots": TIES in
        the deltas' common basis, then cut likewise. `density` belongs to all but the first
        (default 0.2 for ties and knots, 0.5 for dare).
    base: the model they were trained on. With it, heads and other whole tensors become
        `base + sum w (own - base)`; without it their weighted mean, which a note states. DoRA needs
        it, and a rank or energy: its delta is of full rank and depends on the base's weights.

    One adapter at weight 1 is returned as it is. Raises `AdapterError` for adapters of different
    bases, tensors of different shapes, and everything that has no sum, all in one message.
    """
    if method not in METHODS:
        raise AdapterError(f"unknown method {method!r} of combining", nearest(method, METHODS))
    plan = Plan(method, rank, energy, density, seed, METHODS[method] is _linear)
    check_combination(adapters, weights, plan, base)
    if is_itself(adapters, weights, plan):
        return Combination(adapters[0], {}, ())
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.pairs)
    pairs = {module: _combine_pairs(module, adapters, weights, plan, base) for module in modules}
    errors = {module: pair.error for module, pair in pairs.items() if pair.error > 0}
    notes: list[str] = []
    extra = mix_tensors(adapters, weights, base, notes)
    rows = mix_rows(adapters, weights, base, notes)
    return Combination(_assemble(adapters, pairs, extra, rows), errors, tuple(notes))


Merge = Callable[[Sequence[Factors], Sequence[Number], Plan], Approximation]


def _linear(factors: Sequence[Factors], weights: Sequence[Number], plan: Plan) -> Approximation:
    return _cut(lowrank.linear(factors, weights), plan)


def _ties(factors: Sequence[Factors], weights: Sequence[Number], plan: Plan) -> Approximation:
    density = 0.2 if plan.density is None else plan.density
    return lowrank.ties(
        factors, weights, density=density, rank=plan.rank, energy=plan.energy, seed=plan.seed
    )


def _dare(
    factors: Sequence[Factors],
    weights: Sequence[Number],
    plan: Plan,
) -> Approximation:
    return lowrank.dare(
        factors,
        weights,
        density=0.5 if plan.density is None else plan.density,
        consensus="sign" if plan.method == "dare-ties" else "sum",
        rank=plan.rank,
        energy=plan.energy,
        seed=plan.seed,
    )


def _knots(factors: Sequence[Factors], weights: Sequence[Number], plan: Plan) -> Approximation:
    density = 0.2 if plan.density is None else plan.density
    return _cut(lowrank.knots(factors, weights, density=density, seed=plan.seed), plan)


METHODS: dict[str, Merge] = {
    "linear": _linear,
    "task-arithmetic": _linear,
    "ties": _ties,
    "dare": _dare,
    "dare-ties": _dare,
    "knots": _knots,
}


def _cut(factors: Factors, plan: Plan) -> Approximation:
    if plan.rank is None and plan.energy is None:
        return Approximation(factors, 0.0, 0.0)
    return lowrank.truncate(factors, rank=plan.rank, energy=plan.energy)


@dataclass(frozen=True, eq=False)
class _Pair:
    """A combined pair as an `Adapter` holds it; error: relative, of the delta."""

    A: Tensor
    B: Tensor
    scale: Number
    layer: Layer
    error: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def _combine_pairs(
    module: str,
    adapters: Sequence[Adapter],
    weights: Sequence[Number],
    plan: Plan,
    base: nn.Module | None,
) -> _Pair:
    having = [(a, w) for a, w in zip(adapters, weights, strict=True) if module in a.pairs]
    chosen = [weight for _, weight in having]
    layer = having[0][0].layer(module)
    if any(module in adapter.magnitudes for adapter, _ in having) and base is not None:
        found = [_combine_dora(module, having, plan, base)]
    else:
        by_group = zip(*(_by_group(adapter, module) for adapter, _ in having), strict=True)
        found = [METHODS[plan.method](list(pairs), chosen, plan) for pairs in by_group]
    if len(found) == 1:
        pair = found[0].factors
        return _Pair(pair.A, pair.B, pair.scale, layer, found[0].relative_error)
    return _join_groups(found, layer)


def _by_group(adapter: Adapter, module: str) -> list[Factors]:
    """A grouped convolution's delta as the deltas of its groups; else the pair alone."""
    groups, (A, B) = adapter.layer(module).groups, adapter.pairs[module]
    return [
        Factors(A=a, B=b, scale=adapter.scale(module))
        for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)
    ]


def _join_groups(found: Sequence[Approximation], layer: Layer) -> _Pair:
    """Groups side by side, each padded with zeros to the largest rank and scaled to 1."""
    largest = max(item.factors.rank for item in found)
    tops, bottoms = [], []
    for item in found:
        pair, missing = item.factors, largest - item.factors.rank
        tops.append(nn.functional.pad(pair.A, (0, 0, 0, missing)))
        bottoms.append(nn.functional.pad(pair.scale * pair.B, (0, missing)))
    missed = sum(item.error**2 for item in found) ** 0.5
    reached = sum(lowrank.frobenius_norm(item.factors) ** 2 for item in found)
    wanted = (missed**2 + reached) ** 0.5
    return _Pair(
        torch.cat(tops), torch.cat(bottoms), 1.0, layer, missed / wanted if missed else 0.0
    )


def _combine_dora(
    module: str, having: list[tuple[Adapter, Number]], plan: Plan, base: nn.Module
) -> Approximation:
    """The nearest thin factors to `sum w (m / ||W + s B A|| (W + s B A) - W)`, rows at a time."""
    owner = base.get_submodule(module)
    path = path_of(owner)
    if path is None:
        raise _unknown_module(module)
    matrix = path.matrix(owner).detach()

    def rows(start: int, stop: int) -> Tensor:
        weight = matrix[start:stop].float()
        total = torch.zeros_like(weight)
        for adapter, share in having:
            changed = weight + lowrank.delta_rows(adapter.factors(module), start, stop).float()
            if module in adapter.magnitudes:
                magnitude = adapter.magnitudes[module].flatten()[start:stop, None].float()
                changed *= magnitude / torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            total += share * (changed - weight)
        return total

    stream = RowStream((matrix.shape[0], matrix.shape[1]), rows)
    return lowrank.approximate(stream, rank=plan.rank, energy=plan.energy, seed=plan.seed)


def _assemble(
    adapters: Sequence[Adapter],
    pairs: Mapping[str, _Pair],
    extra: Mapping[str, Tensor],
    rows: Mapping[str, tuple[Tensor, Tensor]],
) -> Adapter:
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.scale * pair.rank for module, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    biases = {adapter.config.biases for adapter in adapters}
    whole = dict.fromkeys(name for adapter in adapters for name in adapter.whole_modules)
    config = LoRAConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(pairs),
        rank_pattern=exact_pattern(ranks, rank),
        alpha_pattern=exact_pattern(alphas, alpha),
        whole_modules=tuple(whole),
        token_rows={module: indices.tolist() for module, (indices, _) in rows.items()},
        biases=next((kind for kind in ("all", "targets") if kind in biases), "none"),
    )
    return Adapter(
        config=config,
        pairs={module: (pair.A, pair.B) for module, pair in pairs.items()},
        extra=dict(extra),
        token_rows=dict(rows),
        layers={module: pair.layer for module, pair in pairs.items() if pair.layer != Layer()},
        whole_modules=tuple(whole),
        base=next((adapter.base for adapter in adapters if adapter.base is not None), None),
        facts=dict(set.intersection(*(set(adapter.facts.items()) for adapter in adapters))),
    )


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The modules whose value differs, as patterns of their whole names."""
    return {
        "^" + name.replace(".", r"\."): value for name, value in values.items() if value != default
    }


def _unknown_module(module: str) -> AdapterError:
    return AdapterError(
        f"module {module!r} of the base has no low-rank form", "give the model it was trained on."
    )
