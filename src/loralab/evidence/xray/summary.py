"""What an X-ray means, in sentences a reader can act on."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from loralab.evidence.xray.adapter import XRay
from loralab.evidence.xray.against import Overlap
from loralab.evidence.xray.figures import BaseFigures, ModuleFigures

MOST = 0.8  # of the modules, in "in 80 % of modules"
ENERGY = 0.9  # directions are counted up to this share of the squared norm
ROOM = 0.5  # a rank is said to have room where this share of it is enough


def summarise(found: XRay) -> list[str]:
    """The sentences, most useful first; `figures` has the numbers in them."""
    changed = [module for module in found.modules if module.norm > 0]
    lines = [*_spectrum(found, changed), *_where(found, changed)]
    lines += [*_against_base(found, changed), *_factors(changed), *_others(found)]
    for other in found.overlaps:
        lines += _overlap(other)
    return lines


def figures(found: XRay) -> dict[str, Any]:
    """The numbers behind the sentences, as plain data."""
    changed = [module for module in found.modules if module.norm > 0]
    bases = [module.base for module in changed if module.base is not None]
    modules_bytes = sum(module.num_bytes for module in found.modules)
    other_bytes = sum(other.num_bytes for other in found.others)
    return {
        "modules": len(found.modules),
        "changed_modules": len(changed),
        "directions_for_most": _most(module.directions_90 for module in changed),
        "directions_99_for_most": _most(module.directions_99 for module in changed),
        "effective_rank_median": _median(module.effective_rank for module in changed),
        "stable_rank_median": _median(module.stable_rank for module in changed),
        "norm": math.sqrt(sum(module.norm**2 for module in changed)),
        "energy_by_kind": energy_by_kind(changed),
        "energy_by_block": _shares(changed, lambda module: module.block),
        "relative_norm_median": _median(base.relative_norm for base in bases),
        "amplification_median": _median(
            base.amplification for base in bases if base.amplification is not None
        ),
        "intruders": sum(base.intruders or 0 for base in bases)
        if any(base.intruders is not None for base in bases)
        else None,
        "modules_with_intruders": sum(bool(base.intruders) for base in bases),
        "storage": {
            "pairs_bytes": modules_bytes,
            "others_bytes": other_bytes,
            "total_bytes": modules_bytes + other_bytes,
            "full_weights_bytes": 4 * sum(math.prod(module.shape) for module in found.modules),
        },
    }


def energy_by_kind(modules: Iterable[ModuleFigures]) -> dict[str, float]:
    """Each kind of module with its share of the squared norm of the whole change, largest first."""
    return _shares(modules, lambda module: module.kind)


def _spectrum(found: XRay, changed: Sequence[ModuleFigures]) -> Iterator[str]:
    what = "Full rank" if found.rank is None else f"Rank {found.rank}"
    unchanged = len(found.modules) - len(changed)
    if not changed:
        why = "B is zero everywhere: it was never trained" if found.rank else "they are the same"
        yield f"{what}: it changes no weight at all ({why})."
        return
    most = _most(module.directions_90 for module in changed)
    share = sum(module.directions_90 <= most for module in changed) / len(changed)
    plural = "s" if most > 1 else ""
    line = (
        f"{what}, but 90 % of the change lies in {most} direction{plural} or fewer in"
        f" {share:.0%} of {len(changed)} modules"
    )
    line += f" (median entropy effective rank {_shown(_median(m.effective_rank for m in changed))})"
    if found.rank is not None and most > ROOM * found.rank:
        line = line.replace(", but 90 %", " is in use: 90 %")
    yield line + "."
    if unchanged:
        yield f"{unchanged} of {len(found.modules)} modules are not changed at all."
    if found.rank is not None and most <= ROOM * found.rank:
        held = _share_held(changed, most)
        yield (
            f"Cut to rank {most} it would keep {held:.1%} of the squared norm; what that costs in"
            " quality only held-out rows can say."
        )


def _share_held(changed: Sequence[ModuleFigures], rank: int) -> float:
    held = sum(value**2 for module in changed for value in module.singular_values[:rank])
    return held / sum(module.norm**2 for module in changed)


def _where(found: XRay, changed: Sequence[ModuleFigures]) -> Iterator[str]:
    if len(changed) < 2:
        return
    kinds = energy_by_kind(changed)
    counts: defaultdict[str, int] = defaultdict(int)
    for module in changed:
        counts[module.kind] += 1
    first = ", ".join(f"{kind} {share:.0%}" for kind, share in list(kinds.items())[:3])
    if len(kinds) > 1:
        yield f"Most of the change is in {first} (shares of the squared norm)."
    blocks = [module for module in changed if module.block is not None]
    numbers = sorted({module.block for module in blocks if module.block is not None})
    if len(numbers) >= 4:
        upper = set(numbers[len(numbers) // 2 :])
        share = sum(m.norm**2 for m in blocks if m.block in upper) / sum(m.norm**2 for m in blocks)
        yield (
            f"The upper half of the blocks ({min(upper)} to {numbers[-1]}) holds {share:.0%} of it."
        )


def _against_base(found: XRay, changed: Sequence[ModuleFigures]) -> Iterator[str]:
    bases: list[tuple[ModuleFigures, BaseFigures]] = [
        (module, module.base) for module in changed if module.base is not None
    ]
    if not bases:
        return
    relative = [base.relative_norm for _, base in bases]
    largest = max(bases, key=lambda pair: pair[1].relative_norm)
    line = f"The change is {_median(relative):.2%} of the weight (median of ||delta|| / ||W||)"
    yield f"{line}, at most {largest[1].relative_norm:.2%} ({largest[0].module})."
    amplified = [base.amplification for _, base in bases if base.amplification is not None]
    if amplified:
        yield (
            "Along its own directions the delta acts"
            f" {_median(amplified):.2g} times as strongly as the base did (median amplification)."
        )
    with_directions = [(m, b) for m, b in bases if b.intruders is not None]
    if not with_directions:
        return
    total = sum(base.intruders or 0 for _, base in with_directions)
    hit = [module for module, base in with_directions if base.intruders]
    if total:
        yield (
            f"{total} intruder dimension{'s' if total > 1 else ''} in {len(hit)} of"
            f" {len(with_directions)} modules (first: {hit[0].module}): new strong directions that"
            " the base knows nothing of; they go with forgetting."
        )
        return
    near = min(
        (b.onset_scale for _, b in with_directions if b.onset_scale is not None), default=None
    )
    line = "No intruder dimensions"
    yield line + (
        f"; the nearest module would have its first at about {near:.2g} times the delta."
        if near is not None
        else "."
    )


def _factors(changed: Sequence[ModuleFigures]) -> Iterator[str]:
    balances = [module.balance for module in changed if module.balance is not None]
    if balances:
        middle = _median(balances)
        side = "B is the larger factor" if middle > 1 else "A is the larger factor"
        yield f"{side}: median ||B|| / ||A|| is {middle:.2g}."


def _others(found: XRay) -> Iterator[str]:
    if not found.others:
        return
    pairs = sum(module.num_bytes for module in found.modules)
    rest = sum(other.num_bytes for other in found.others)
    roles = sorted({other.role for other in found.others})
    count = len(found.others)
    more = "1 more tensor is" if count == 1 else f"{count} more tensors are"
    yield (
        f"{more} replaced whole ({', '.join(roles)}):"
        f" {rest / (pairs + rest):.0%} of the adapter's bytes."
    )


def _overlap(other: Overlap) -> Iterator[str]:
    count = len(other.modules)
    above = sum(m.inputs.above_chance or m.outputs.above_chance for m in other.modules)
    shared = _median(module.inputs.shared for module in other.modules)
    chance = _median(module.inputs.expected for module in other.modules)
    outputs = _median(module.outputs.shared for module in other.modules)
    outputs_chance = _median(module.outputs.expected for module in other.modules)
    first = _median(module.inputs.first for module in other.modules)
    yield (
        f"Against {other.name}: median overlap {shared:.2f} on inputs ({chance:.2f} by chance) and"
        f" {outputs:.2f} on outputs ({outputs_chance:.2f}); above chance in {above} of {count}"
        f" modules; first directions {first:.2f}; cosine of the whole deltas {other.cosine:.2f}."
    )
    alone = len(other.only_first) + len(other.only_second)
    if alone:
        yield f"{alone} modules are adapted by only one of the two."


def _most(values: Iterable[int]) -> int:
    """The least value that at least 80 % do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[math.ceil(MOST * len(ordered)) - 1] if ordered else 0


def _shares(
    modules: Iterable[ModuleFigures], key: Callable[[ModuleFigures], Any]
) -> dict[Any, float]:
    sums: defaultdict[Any, float] = defaultdict(float)
    for module in modules:
        sums[key(module)] += module.norm**2
    total = sum(sums.values())
    return {name: share / total for name, share in sorted(sums.items(), key=lambda i: -i[1])}


def _median(values: Iterable[float | int]) -> float:
    known = list(values)
    return float(median(known)) if known else 0.0


def _shown(value: float) -> str:
    return f"{value:.1f}"
