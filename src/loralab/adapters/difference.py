"""A fully tuned model as an adapter: the best pairs of a rank for everything that changed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.adapter import Adapter, Layer
from loralab.adapters.extracting import model_facts
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.layers import EMBEDDING, TRANSPOSED, layer_of, path_of
from loralab.adapters.merging import weight_name
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import output_head, walk
from loralab.errors import AdapterError
from loralab.lowrank import balanced, dense_svd

Read = Callable[[str], Tensor | None]


@dataclass(frozen=True, eq=False)
class Difference:
    """An adapter in the place of a tuned model, and how much of the change it holds.

    kept: module -> the share of its change's squared norm that the pair holds; whole: tensors that
    are held exactly; notes: what the adapter cannot hold.
    """

    adapter: Adapter
    kept: Mapping[str, float]
    squared_norms: Mapping[str, float]
    whole: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def kept_share(self) -> float:
        """The share of the squared norm of all changes in pairs that the pairs hold."""
        total = sum(self.squared_norms.values())
        if total == 0:
            return 1.0
        return sum(self.kept[name] * norm for name, norm in self.squared_norms.items()) / total


def adapter_of_difference(
    model: nn.Module,
    base: Read,
    tuned: Read,
    rank: int,
    *,
    tick: Callable[[int], None] = lambda _: None,
) -> Difference:
    """The adapter of that rank that comes nearest to `tuned` on top of `base`.

    model: the tuned model's structure (on the meta device); base, tuned: its parameters by name,
    None where a model has none. Linear layers, convolutions and embeddings get the best pair there
    is (Eckart, Young, Mirsky); the head, norms and whatever the base lacks are held whole; biases
    of adapted modules too. Raises `AdapterError` where nothing changed, or nothing is common.
    """
    builder = _Builder(model, base, tuned, rank)
    for done, (path, module) in enumerate(walk(model), start=1):
        builder.add(path, module)
        tick(done)
    return builder.finish()


class _Builder:
    """What has been collected of the adapter, module by module."""

    def __init__(self, model: nn.Module, base: Read, tuned: Read, rank: int) -> None:
        self._model, self._base, self._tuned, self._rank = model, base, tuned, rank
        self._heads = output_head(model)
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers: dict[str, Layer] = {}
        self._extra: dict[str, Tensor] = {}
        self._whole: list[str] = []
        self._kept: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        self._common = 0
        self._notes: list[str] = []
        self._tied = _tied_weights(model)

    def add(self, path: str, module: nn.Module) -> None:
        names = [f"{path}.{name}" for name, p in module._parameters.items() if p is not None]
        after = {name: self._tuned(name) for name in names}
        before = {name: self._base(name) for name in names}
        present = {name: tensor for name, tensor in after.items() if tensor is not None}
        self._common += sum(before[name] is not None for name in present)
        changed = [name for name, tensor in present.items() if not _same(before[name], tensor)]
        if not changed or any(_inside(path, whole) for whole in self._whole):
            return
        new = any(_shape(before[name]) != _shape(present[name]) for name in changed)
        in_head = any(_inside(path, head) for head in self._heads)
        way = path_of(module)
        if way is None or in_head or new:
            self._hold_whole(path, present)
            return
        weight = f"{path}.{weight_name(module)}"
        for name in changed:
            if name != weight:
                self._extra[name] = present[name]
        if weight in changed:
            start = before[weight]
            assert start is not None  # else it would be new
            self._pair(path, module, weight, present[weight].float() - start.float())

    def _hold_whole(self, path: str, present: Mapping[str, Tensor]) -> None:
        self._whole.append(path)
        self._extra.update(present)

    def _pair(self, path: str, module: nn.Module, weight: str, delta: Tensor) -> None:
        matrix = delta.flatten(1)
        if path_of(module) in (TRANSPOSED, EMBEDDING):
            matrix = matrix.mT
        A, B, kept, norm = _best_pair(matrix, self._rank)
        self._pairs[path] = (A, B)
        self._layers[path] = layer_of(module)
        self._kept[path], self._norms[path] = kept, norm
        if weight in self._tied:
            self._notes.append(f"{weight} is tied to another weight; the pair moves {path} alone")

    def finish(self) -> Difference:
        if not self._common:
            raise AdapterError(
                "the checkpoint and the base have no parameter in common",
                "give the base that the checkpoint was tuned from with --base.",
            )
        if not self._pairs and not self._extra:
            raise AdapterError(
                "the checkpoint is the base: nothing changed", "give the tuned checkpoint."
            )
        biases = any(
            name.endswith(".bias") and name.removesuffix(".bias") in self._pairs
            for name in self._extra
        )
        ranks = {path: A.shape[0] for path, (A, _) in self._pairs.items()}
        smaller = {path: rank for path, rank in ranks.items() if rank != self._rank}
        lone = [n for n in self._extra if n.rpartition(".")[0] not in (*self._pairs, *self._whole)]
        config = LoRAConfig(
            rank=self._rank,
            alpha=self._rank,
            targets=tuple(self._pairs),
            rank_pattern=smaller,
            alpha_pattern=dict(smaller),
            whole_modules=tuple(self._whole),
            biases="all" if lone else "targets" if biases else "none",
        )
        facts = model_facts(self._model, self._pairs)
        if any(isinstance(self._model.get_submodule(path), Conv1D) for path in self._pairs):
            facts["fan_in_fan_out"] = "true"
        adapter = Adapter(
            config=config,
            pairs=self._pairs,
            extra=self._extra,
            layers={path: layer for path, layer in self._layers.items() if layer != Layer()},
            whole_modules=tuple(self._whole),
            base=fingerprint(self._model, self._base) or None,
            facts=facts,
        )
        return Difference(adapter, self._kept, self._norms, tuple(self._extra), tuple(self._notes))


def _best_pair(matrix: Float[Tensor, "out in"], rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(A, B, the share of the squared norm they hold, that squared norm)."""
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    svd = dense_svd(matrix, rank)
    factors = balanced(svd, len(svd.S))
    held = float(svd.S.double().square().sum())
    return factors.A.contiguous(), factors.B.contiguous(), min(1.0, held / total), total


def _tied_weights(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _same(before: Tensor | None, after: Tensor) -> bool:
    if before is None or before.shape != after.shape:
        return False
    return (
        torch.equal(before, after)
        if before.dtype == after.dtype
        else bool((before.float() == after.float()).all())
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _inside(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")
