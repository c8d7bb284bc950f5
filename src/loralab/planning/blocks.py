"""Runs of alike blocks, and models cut down to a few of each: what repeats is traced once.

A run of n alike blocks costs a constant plus n times the same, so a model with three and with four
of them tells the rest. Frozen and trained blocks are different runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from loralab.errors import ModelError
from loralab.models import blocks
from loralab.planning.timeline import Place

_KINDS = (
    ("attention", ("attn", "attention")),
    ("norms", ("norm", "ln_", "layernorm")),
    (
        "feed-forward",
        ("mlp", "ffn", "feed_forward", "fc", "intermediate", "output", "dense", "activation"),
    ),
)


@dataclass(frozen=True)
class Run:
    """Blocks `first` to `last` (counted in the whole model) are alike; `kept` of them are traced.

    Where a model alternates between kinds of blocks, `period` of them repeat together.
    """

    number: int
    first: int
    last: int
    period: int
    kept: int

    @property
    def length(self) -> int:
        """How many blocks the whole model has in this run."""
        return self.last - self.first + 1

    def keeping(self, kept: int) -> "Run":
        """The run with another number of traced blocks, at most all."""
        return replace(self, kept=min(kept, self.length))


def find_runs(model: nn.Module) -> list[Run]:
    """The runs of alike blocks of `model`, all blocks kept; empty where nothing repeats."""
    try:
        _, layers = blocks(model)
    except ModelError:
        return []
    signatures = [_signature(block, index, model) for index, block in enumerate(layers)]
    runs: list[Run] = []
    start = 0
    while start < len(signatures):
        period, end = _longest_repeat(signatures, start)
        runs.append(Run(len(runs), start, end - 1, period, end - start))
        start = end
    return runs


def _signature(block: nn.Module, index: int, model: nn.Module) -> tuple[Any, ...]:
    """What makes two blocks alike: classes, shapes, who trains, and the kind of attention."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    kind = kinds[index] if kinds and index < len(kinds) else ""
    modules = tuple((name, type(module).__qualname__) for name, module in block.named_modules())
    parameters = tuple(
        (name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()
    )
    return kind, modules, parameters


def _longest_repeat(signatures: Sequence[Any], start: int) -> tuple[int, int]:
    """(period, end) of the longest stretch from `start` that repeats with a short period."""
    best = (1, start + 1)
    for period in range(1, 9):
        end = start + period
        while end < len(signatures) and signatures[end] == signatures[end - period]:
            end += 1
        whole = start + (end - start) // period * period
        if whole - start >= 2 * period and whole > best[1]:
            best = (period, whole)
    return best


@contextmanager
def kept_blocks(model: nn.Module, runs: Sequence[Run]) -> Iterator[None]:
    """Inside, `model` has only the kept blocks of each run."""
    if all(run.kept == run.length for run in runs):
        yield
        return
    _, layers = blocks(model)
    everything = dict(layers._modules)
    chosen = [layers[index] for index in _kept_indices(runs)]
    config: Any = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    depth = getattr(config, "num_hidden_layers", None)
    try:
        layers._modules.clear()
        for index, block in enumerate(chosen):
            layers._modules[str(index)] = block
        if depth == len(everything):
            config.num_hidden_layers = len(chosen)
        if kinds:
            config.layer_types = [kinds[index] for index in _kept_indices(runs)]
        yield
    finally:
        layers._modules.clear()
        layers._modules.update(everything)
        if depth == len(everything):
            config.num_hidden_layers = depth
        if kinds:
            config.layer_types = kinds


def renumber_blocks(model: nn.Module) -> None:
    """Tell the modules of a cut model's blocks their new numbers, which index key-value caches."""
    try:
        _, layers = blocks(model)
    except ModelError:
        return
    for index, block in enumerate(layers):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = index


def _kept_indices(runs: Sequence[Run]) -> list[int]:
    return [run.first + offset for run in runs for offset in range(run.kept)]


def linear_layers(model: nn.Module, kind: str) -> list[str]:
    """Paths inside the first block of its linear layers of one kind ("attention")."""
    try:
        _, layers = blocks(model)
    except ModelError:
        return []
    return [
        name.removesuffix(".base_layer")  # where PEFT has wrapped it
        for name, module in layers[0].named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _inside_kind(name) == kind
    ]


def places_of(model: nn.Module, runs: Sequence[Run]) -> dict[int, Place]:
    """Where each module (by id) stands: its block's number in the kept model, its kind of layer."""
    try:
        prefix = blocks(model)[0] + "."
    except ModelError:
        prefix = "\0"
    owner = [run.number for run in runs for _ in range(run.kept)]
    return {id(module): _place(name, prefix, owner) for name, module in model.named_modules()}


def _place(name: str, prefix: str, owner: Sequence[int]) -> Place:
    if not name.startswith(prefix):
        return Place(kind=_outside_kind(name))
    number, _, inner = name.removeprefix(prefix).partition(".")
    block = int(number)
    run = owner[block] if block < len(owner) else 0
    return Place(block, run, _inside_kind(inner))


def _inside_kind(inner: str) -> str:
    # dropouts of adapters (PEFT's module) belong to the adapter, whatever layer they are in
    if "lora_" in inner:
        return "adapter"
    for part in inner.lower().split("."):
        for kind, words in _KINDS:
            if any(word in part for word in words):
                return kind
    return inner.partition(".")[0].replace("_", " ") or "blocks"


def _outside_kind(name: str) -> str:
    last = name.lower().rpartition(".")[2]
    if not name:
        return ""
    if "embed" in last or last in ("wte", "wpe", "embeddings"):
        return "embeddings"
    if last in ("score", "classifier", "lm_head", "head", "out_proj"):
        return "head"
    if "norm" in last or last.startswith("ln"):
        return "norms"
    return ""
