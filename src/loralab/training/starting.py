"""Where an adapter starts: from a recipe's settings, from data, or from the start that was kept.

A start made from data or from a decomposition of the weights is made once. A run keeps it beside
its checkpoints, since the bits of a gradient or an SVD may differ when they are computed again.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn

from loralab.adapters import LoRAConfig, eva_starts, lora_ga_starts
from loralab.config import MethodSection, Task, TrainingSection
from loralab.data import Encoded, sample
from loralab.errors import ConfigError, ResumeError, TargetError, nearest
from loralab.files import replacing
from loralab.lowrank import MOVES_THE_BASE, Factors, Initialiser, Number, Start
from loralab.models import evaluating
from loralab.training.batches import batch_for

START_FILE = "start.safetensors"
FROM_DATA = frozenset({"eva", "lora_ga"})
KEPT = FROM_DATA | MOVES_THE_BASE  # the others are drawn on the CPU, alike wherever they are drawn


def lora_config(method: MethodSection, head: str | None) -> LoRAConfig:
    """The adapter of a recipe, with the head (if any) among the modules that it trains whole."""
    heads = [head] if head and head not in method.whole_modules else []
    return LoRAConfig(
        rank=method.rank,
        alpha=method.alpha,
        targets=method.targets,
        exclude=method.exclude,
        dropout=method.dropout,
        scaling=method.scaling,
        init=method.init,
        whole_modules=(*heads, *method.whole_modules),
        layers=method.layers,
        rank_pattern=method.rank_pattern,
        alpha_pattern=method.alpha_pattern,
        token_rows=method.token_rows,
        biases=method.biases,
        dora=method.dora,
    )


def check_patterns(config: LoRAConfig, modules: Iterable[str]) -> None:
    """Raise `TargetError` that lists every pattern which matches none of the adapter's modules."""
    names = [*modules, *config.exclude]  # EVA may have left a module without a rank
    last = {name.rpartition(".")[2] for name in names}
    faults = [
        f"{table} {pattern!r} matches no module of the adapter; {nearest(pattern, last)}"
        for table in ("rank_pattern", "alpha_pattern")
        for pattern in getattr(config, table)
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)
    ]
    if faults:
        raise TargetError(
            "; ".join(faults), "patterns are endings of names, or expressions that match one."
        )


def starts_from_data(
    model: nn.Module,
    config: LoRAConfig,
    method: MethodSection,
    training: TrainingSection,
    *,
    task: Task,
    rows: Sequence[Encoded],
) -> tuple[Mapping[str, Initialiser], LoRAConfig]:
    """The initialisers by module that `method.init` makes from training rows, and the config.

    The rows are chosen by the hash of their names and the seed, and run without dropout. EVA looks
    at inputs, so its rows are cut to the shortest of their batch: padding is no input. It changes
    the ranks, unless `redistribute_ranks` is off or `rank_pattern` gives them.

    Raises `ConfigError` without rows, `AdapterError` for targets that the method cannot start.
    """
    if not rows:
        raise ConfigError(
            f"method.init {method.init!r} looks at training rows, and there are none",
            "give training rows, or choose another method.init.",
        )
    chosen = sample(rows, method.init_rows, f"init {training.seed}")
    looked_at = _Look(model, task, _batches(chosen, method.init, training.batch_size))
    with evaluating(model):
        if method.init == "lora_ga":
            return lora_ga_starts(model, config, looked_at.batches(), looked_at.loss), config
        if method.redistribute_ranks and not config.rank_pattern:
            return eva_starts(model, config, looked_at.batches())
        widest = max([config.rank, *config.rank_pattern.values()])
        wide = replace(config, rank=widest)
        starts, _ = eva_starts(model, wide, looked_at.batches(), redistribute=False)
        return starts, config


def write_start(path: Path, config: LoRAConfig, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Keep A and B of every module, and the ranks that were chosen. Raises `OutputError`."""
    tensors = {}
    for module, (A, B) in pairs.items():
        tensors[f"{module}.A"] = A.detach().cpu().contiguous()
        tensors[f"{module}.B"] = B.detach().cpu().contiguous()
    chosen = {"rank_pattern": dict(config.rank_pattern), "exclude": list(config.exclude)}
    data = save(tensors, {"config": json.dumps(chosen)})
    with replacing(path) as aside:
        aside.write_bytes(data)


def read_start(path: Path, config: LoRAConfig) -> tuple[Mapping[str, Initialiser], LoRAConfig]:
    """What `write_start` kept, for attaching it again. Raises `ResumeError` where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            chosen = json.loads(file.metadata()["config"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path} is damaged ({error})", "start a new run in another folder."
        ) from None
    moves = config.init in MOVES_THE_BASE
    modules = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    starts = {m: _kept(tensors[f"{m}.A"], tensors[f"{m}.B"], moves) for m in modules}
    changed = replace(config, rank_pattern=chosen["rank_pattern"], exclude=tuple(chosen["exclude"]))
    return starts, changed


def start_hash(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """SHA-256 of the factors of every module."""
    digest = hashlib.sha256()
    for module in sorted(pairs):
        digest.update(module.encode())
        for factor in pairs[module]:
            values = factor.detach().cpu().contiguous()
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.numpy().data)
    return digest.hexdigest()


def _kept(A: Tensor, B: Tensor, moves: bool) -> Initialiser:
    def start(
        weight: Float[Tensor, "out in"],
        rank: int,
        scale: Number,
        generator: Generator | None = None,
    ) -> Start:
        taken_off = Factors(A=A.clone(), B=B.clone(), scale=-scale) if moves else None
        return Start(A=A.clone(), B=B.clone(), base_change=taken_off)

    return start


class _Look:
    """The model's inputs batch by batch, and the loss of the batch that was given last."""

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Sequence[Encoded]]) -> None:
        self._model, self._task, self._batches = model, task, batches
        self._fixed: dict[str, Any] = {}
        if "use_cache" in inspect.signature(model.forward).parameters:
            self._fixed["use_cache"] = False
        self._labels = torch.empty(0)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The model's inputs, batch by batch."""
        for rows in self._batches:
            batch = batch_for(self._model, rows)
            self._labels = batch.labels.to(batch.input_ids.device)
            yield {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                **self._fixed,
            }

    def loss(self, output: Any) -> Float[Tensor, ""]:
        """The summed nll of the present batch's targets: every target counts alike."""
        logits, labels = output.logits.float(), self._labels
        if self._task == "causal":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels, reduction="sum")


def _batches(rows: Sequence[Encoded], init: str, batch_size: int) -> list[list[Encoded]]:
    """Rows of like length together; for EVA cut to the shortest, so that there is no padding."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    if init != "eva":
        return batches
    return [[_cut(row, len(batch[0].input_ids)) for row in batch] for batch in batches]


def _cut(row: Encoded, length: int) -> Encoded:
    targets = None if row.targets is None else row.targets[:length]
    return replace(row, input_ids=row.input_ids[:length], targets=targets)
