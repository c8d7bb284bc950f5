"""An adapter in the form that engines cannot misread: one rank, alpha equal to it, no patterns.

Engines have applied `lora_alpha / r` to adapters of other scales, ignored patterns of ranks and
dropped modules whose siblings were missing, all without a word. So the scale is multiplied into B,
every pair is padded with zeros to one rank, and what an engine would leave out is refused by name.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import Adapter, LoRAConfig, change_at
from loralab.errors import AdapterError
from loralab.exporting.engines import Engine, parts_of
from loralab.lowrank import Approximation, Factors, RowStream, approximate, truncate

Read = Callable[[str], Tensor | None]
Pair = tuple[Float[Tensor, "_rank _in"], Float[Tensor, "_out _rank"]]
LARGE_ERROR = 0.1  # of a module's delta, above which a conversion is warned of

logger = logging.getLogger("loralab")


@dataclass(frozen=True, eq=False)
class Canonical:
    """The converted adapter, and what the conversion cost.

    rank: of every pair, and alpha.
    errors: module -> `||wanted - delta||_F / ||wanted||_F`, where the delta is not the same.
    notes: what else was changed, a sentence each.
    """

    adapter: Adapter
    rank: int
    errors: Mapping[str, float]
    notes: tuple[str, ...]


def canonical(
    adapter: Adapter,
    engine: Engine,
    *,
    rank: int | None = None,
    weights: Read | None = None,
    structure: nn.Module | None = None,
) -> Canonical:
    """The adapter as that engine applies it rightly.

    rank: cut every delta to the best of that rank; DoRA, whose delta is of full rank, becomes a
        plain pair of that rank where the engine knows no DoRA.
    weights: the base's tensors by name, for DoRA; structure: its modules, for missing siblings.

    Folding the scale costs one rounding of B in fp32, padding nothing. Raises `AdapterError` that
    lists everything that the engine would refuse or leave out, with what can be done.
    """
    _check_carried(adapter, engine, rank, weights)
    errors: dict[str, float] = {}
    pairs: dict[str, Pair] = {}
    converted = set(adapter.magnitudes) if "DoRA" not in engine.carries else set()
    for path in adapter.pairs:
        found = _reduced(adapter, path, rank, weights, dora=path in converted)
        if found.relative_error > 0:
            errors[path] = found.relative_error
        pairs[path] = _folded(found.factors)
    widest = max((A.shape[0] for A, _ in pairs.values()), default=1)
    grouped = {path for path in pairs if adapter.layer(path).groups > 1}
    pairs = {p: pair if p in grouped else _padded(pair, widest) for p, pair in pairs.items()}
    notes = _notes(adapter, converted, errors, rank)
    added = _missing_siblings(pairs, engine, structure)
    if added:
        notes.append(
            f"{len(added)} pairs of zeros were added ({', '.join(sorted(_last(added)))}), since"
            f" {engine.name} stacks them with their neighbours"
        )
    value = _assembled(adapter, {**pairs, **added}, widest, converted)
    if errors:  # what it said when it was saved, it says no more
        value = replace(value, probes=())
    _check_limit(value, engine, widest)
    return Canonical(value, widest, errors, tuple(notes))


def _check_carried(
    adapter: Adapter, engine: Engine, rank: int | None, weights: Read | None
) -> None:
    faults, approximable = [], True
    for part, names in parts_of(adapter).items():
        if part in engine.carries:
            continue
        if part == "whole modules":
            names = [name for name in names if name.rpartition(".")[2] not in engine.heads]
        if part == "DoRA" and rank is not None and weights is not None:
            continue
        if names:
            faults.append(f"{part}: {_some(names)} ({engine.why[part]})")
            approximable &= part == "DoRA"
    if len(adapter.whole_modules) > 1 and engine.heads and not faults:
        faults.append(
            f"whole modules: {_some(list(adapter.whole_modules))} (one head an adapter is taken)"
        )
        approximable = False
    if not faults:
        return
    ways = "merge instead (--merged), which carries all of it"
    if approximable:
        wants = "" if weights is not None else " and name the base (--base)"
        ways += (
            f"; or give --rank to approximate DoRA by plain pairs of that rank{wants}, with the"
            " error of each module stated"
        )
    raise AdapterError(
        "\n  - ".join([f"{engine.name} {engine.version} would not apply all of this", *faults]),
        ways + ".",
    )


def _check_limit(adapter: Adapter, engine: Engine, rank: int) -> None:
    if engine.rank_limit(rank) is None:
        most = engine.rank_limits[-1]
        raise AdapterError(
            f"rank {rank} is above {engine.name}'s largest, {most}",
            f"cut it with --rank {most} (the error is stated), or merge instead (--merged).",
        )


def _reduced(
    adapter: Adapter, path: str, rank: int | None, weights: Read | None, *, dora: bool
) -> Approximation:
    """The module's delta by at most `rank` directions."""
    factors = adapter.factors(path).working()
    if dora:
        assert rank is not None and weights is not None  # checked before
        return _plain_dora(adapter, path, rank, weights)
    if rank is None or adapter.layer(path).groups > 1 or path in adapter.magnitudes:
        return Approximation(factors, 0.0, 0.0)
    return truncate(factors, rank=rank)


def _plain_dora(adapter: Adapter, path: str, rank: int, weights: Read) -> Approximation:
    """The best pair for `m / ||W + s B A|| (W + s B A) - W`, which is of full rank."""
    stored = weights(f"{path}.weight")
    change = change_at(adapter, path)
    shape = (change.B.shape[0], change.A.shape[1])
    if stored is None or stored.numel() != shape[0] * shape[1]:
        raise AdapterError(
            f"the base has no weight {path}.weight of the shape {shape}, which DoRA changes",
            "give the base the adapter was trained on with --base.",
        )
    matrix = stored if stored.shape == shape else stored.flatten(1)
    if matrix.shape != shape:
        matrix = matrix.mT  # GPT-2's layers hold their weights transposed
    matrix = matrix.float()

    def rows(start: int, stop: int) -> Tensor:
        wanted = torch.empty_like(matrix[start:stop])
        change.rows(start, stop).add(matrix[start:stop], wanted)
        return wanted - matrix[start:stop]

    return approximate(RowStream(shape, rows), rank=min(rank, *shape))


def _folded(factors: Factors) -> Pair:
    pair = factors.working()
    return pair.A.contiguous(), (pair.B * pair.scale).contiguous()


def _padded(pair: Pair, rank: int) -> Pair:
    A, B = pair
    missing = rank - A.shape[0]
    if missing == 0:
        return pair
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def _missing_siblings(
    pairs: Mapping[str, Pair], engine: Engine, structure: nn.Module | None
) -> dict[str, Pair]:
    """Pairs of zeros for the modules without which the engine misreads those beside them."""
    added: dict[str, Pair] = {}
    for needed, optional in engine.stacked:
        stacked = {*needed, *optional}
        owners = {p.rpartition(".")[0] for p in pairs if p.rpartition(".")[2] in stacked}
        for owner in owners:
            for name in needed:
                path = f"{owner}.{name}"
                if path not in pairs:
                    added[path] = _zeros(path, next(iter(pairs.values())), structure, engine)
    return added


def _zeros(path: str, like: Pair, structure: nn.Module | None, engine: Engine) -> Pair:
    module = None if structure is None else dict(structure.named_modules()).get(path)
    if not isinstance(module, nn.Linear):
        raise AdapterError(
            f"{engine.name} {engine.version} reads the neighbours of {path} only where it has a"
            " pair too, and the shape of that module is not known",
            "name the base with --base, so that a pair of zeros can be added.",
        )
    A, B = like
    return (
        A.new_zeros(A.shape[0], module.in_features),
        B.new_zeros(module.out_features, B.shape[1]),
    )


def _assembled(
    adapter: Adapter, pairs: Mapping[str, Pair], rank: int, converted: set[str]
) -> Adapter:
    own = {path: A.shape[0] for path, (A, _) in pairs.items() if A.shape[0] != rank}
    exceptions = {"^" + path.replace(".", r"\."): value for path, value in own.items()}
    config = LoRAConfig(
        rank=rank,
        alpha=rank,
        targets=tuple(pairs),
        rank_pattern=exceptions,
        alpha_pattern=dict(exceptions),
        whole_modules=adapter.config.whole_modules,
        token_rows=adapter.config.token_rows,
        biases=adapter.config.biases,
        dora=adapter.config.dora and not converted,
    )
    return replace(
        adapter,
        config=config,
        pairs=dict(pairs),
        magnitudes={p: m for p, m in adapter.magnitudes.items() if p not in converted},
    )


def _notes(
    adapter: Adapter, converted: set[str], errors: Mapping[str, float], rank: int | None
) -> list[str]:
    notes = []
    if converted:
        notes.append(f"DoRA of {len(converted)} modules became plain pairs of rank {rank}")
    if errors:
        worst = max(errors, key=lambda path: errors[path])
        text = f"the largest error is {errors[worst]:.1%} of the delta of {worst}"
        notes.append(text)
        if errors[worst] > LARGE_ERROR:
            logger.warning("%s; a larger --rank or --merged keeps more", text)
    scales = {adapter.scale(path) for path in adapter.pairs}
    if scales - {1.0}:
        listed = ", ".join(f"{scale:.4g}" for scale in sorted(scales)[:4])
        notes.append(f"the scale ({listed}) is folded into B, so alpha is the rank")
    ranks = {A.shape[0] for A, _ in adapter.pairs.values()}
    if len(ranks) > 1:
        notes.append(f"ranks {min(ranks)} to {max(ranks)} are padded with zeros to one")
    return notes


def _last(paths: Mapping[str, Pair]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
