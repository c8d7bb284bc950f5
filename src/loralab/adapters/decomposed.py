"""An adapter beside the SVD of each of its deltas, from which smaller ones are cut in no time."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.algebra import exact_pattern
from loralab.adapters.peft_names import is_inner
from loralab.errors import AdapterError
from loralab.lowrank import SVD, Factors, Number, balanced, factored_svd, ranks_within


@dataclass(frozen=True, eq=False)
class Decomposed:
    """`adapter` and what can be cut from it; each SVD is made once.

    Grouped convolutions whose factors do not multiply to one matrix (`Layer.groups` above 1) stay
    as they are. DoRA's magnitudes stay too: the smaller delta goes through the same formula.
    """

    adapter: Adapter

    @cached_property
    def svds(self) -> Mapping[str, SVD]:
        """Module -> SVD of its delta, where there is one matrix to decompose."""
        pairs = self.adapter.pairs
        return {m: factored_svd(self.adapter.factors(m)) for m in pairs if self._is_matrix(m)}

    def _is_matrix(self, module: str) -> bool:
        return self.adapter.layer(module).groups == 1

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max((A.shape[0] for A, _ in self.adapter.pairs.values()), default=0)

    def cost(self, module: str) -> int:
        """Numbers that one direction of the module takes."""
        A, B = self.adapter.pairs[module]
        return A.shape[1] + B.shape[0]

    def uniform_ranks(self, rank: int) -> dict[str, int]:
        """At most `rank` in every module."""
        pairs = self.adapter.pairs
        return {m: min(rank, pairs[m][0].shape[0]) for m in self.svds}

    def global_ranks(self, rank: int) -> dict[str, int]:
        """One threshold over all modules, within the size of `uniform_ranks(rank)`."""
        costs = {module: self.cost(module) for module in self.svds}
        budget = sum(costs[module] * kept for module, kept in self.uniform_ranks(rank).items())
        values = {module: svd.S for module, svd in self.svds.items()}
        return self._tied(ranks_within(values, costs, budget))

    def _tied(self, ranks: dict[str, int]) -> dict[str, int]:
        """PEFT gives an attention's output projection the attention's own rank."""
        for inner in [module for module in ranks if is_inner(module, ranks)]:
            outer = inner.removesuffix(".out_proj")
            ranks[inner] = ranks[outer] = max(ranks[inner], ranks[outer])
        return ranks

    def truncated(self, ranks: Mapping[str, int]) -> Adapter:
        """The best adapter with these ranks (Eckart-Young-Mirsky in each module).

        Modules not named, and those already that small, keep their factors. Everything else of the
        adapter (heads, biases, token rows) is kept; its probes are not: they are not its own.
        """
        faults = [f"{m}: rank {rank}" for m, rank in ranks.items() if rank < 1]
        faults += [f"no module {m!r}" for m in ranks if m not in self.svds]
        if faults:
            raise AdapterError(
                "cannot truncate: " + "; ".join(faults), "give ranks above 0 of its own modules."
            )
        own = self.adapter.pairs
        cut = {
            module: balanced(self.svds[module], rank)
            for module, rank in ranks.items()
            if rank < own[module][0].shape[0]
        }
        return self._with(cut)

    def capped(self, limits: Mapping[str, Number]) -> Adapter:
        """No singular value of a module's delta above its limit; directions and ranks stay."""
        changed = {}
        for module, limit in limits.items():
            svd = self.svds[module]
            if len(svd.S) and float(svd.S[0]) > limit:
                lower = SVD(svd.U, svd.S.clamp(max=limit), svd.Vh)
                changed[module] = balanced(lower, len(svd.S))
        return self._with(changed)

    def scaled(self, weight: Number) -> Adapter:
        """Every delta times `weight`; whole modules, biases and token rows stay."""
        adapter = self.adapter
        pairs = {m: (A, weight * B) for m, (A, B) in adapter.pairs.items()}
        return replace(adapter, pairs=pairs, probes=())

    def relative_error(self, ranks: Mapping[str, int]) -> float:
        """`||dropped||_F / ||delta||_F` over all modules together; 0 for a zero adapter."""
        dropped = sum(_squares(svd.S[ranks.get(m, len(svd.S)) :]) for m, svd in self.svds.items())
        total = sum(_squares(svd.S) for svd in self.svds.values())
        return (dropped / total) ** 0.5 if total > 0 else 0.0

    def _with(self, changed: Mapping[str, Factors]) -> Adapter:
        adapter = self.adapter
        found = {m: changed.get(m) or adapter.factors(m) for m in adapter.pairs}
        ranks = {module: pair.rank for module, pair in found.items()}
        alphas = {module: float(pair.scale * pair.rank) for module, pair in found.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        config = replace(
            adapter.config,
            rank=rank,
            alpha=alpha,
            rank_pattern=exact_pattern(ranks, rank),
            alpha_pattern=exact_pattern(alphas, alpha),
            scaling="alpha/rank",
            init="kaiming",
        )
        pairs = {m: (pair.A.contiguous(), pair.B.contiguous()) for m, pair in found.items()}
        return replace(adapter, config=config, pairs=pairs, probes=())


def num_bytes(adapter: Adapter) -> int:
    """The bytes of all its tensors: its file without names and settings."""
    tensors = [*adapter.extra.values(), *adapter.magnitudes.values()]
    tensors += [tensor for pair in adapter.pairs.values() for tensor in pair]
    tensors += [rows for _, rows in adapter.token_rows.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _squares(values: Float[Tensor, "kept"]) -> float:
    return float(torch.sum(values.double() ** 2))
