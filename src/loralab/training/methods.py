"""Which parameters a method trains, at which learning rate, with which decay."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from loralab.adapters import LoRAConfig, adapter_parameters, attach, detach, use
from loralab.config import MethodSection, Task, TrainingSection
from loralab.data import Row
from loralab.errors import ConfigError, TargetError
from loralab.models import blocks, enable_activation_checkpointing, head_name, lower_parameters
from loralab.placement import device_kind
from loralab.training.batches import text_rows
from loralab.training.devices import choose_device, use_threads
from loralab.training.objective import MakesObjective
from loralab.training.starting import (
    FROM_DATA,
    KEPT,
    check_patterns,
    lora_config,
    read_start,
    start_hash,
    starts_from_data,
    write_start,
)
from loralab.training.streams import stream_seed

ADAPTER_NAME = "default"
ADAPTERS = ".adapters."


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a role, a learning rate and a weight decay."""

    role: str  # "base", "adapter", "adapter_B" (LoRA+) or "head"
    parameters: dict[str, nn.Parameter]  # by their names in the model
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Trainable:
    """A model made ready for one method: who trains, at which rate, along which route.

    Trained parameters go by the names that they have in a model of the run's own, whatever the
    route is called: so what a run stores is the same whether it shared its model or not.
    """

    model: nn.Module
    task: Task | MakesObjective
    method: MethodSection
    training: TrainingSection
    groups: tuple[ParameterGroup, ...]
    route: str | None  # the adapter's name; None where the base itself trains
    head: str | None  # the head's module name; None for causal models
    num_frozen_blocks: int  # blocks from the bottom that do not train
    device: torch.device
    adapter: LoRAConfig | None = None  # as attached: EVA may have changed its ranks
    base_hash: str = ""  # of the frozen parameters, before another run shares the model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name."""
        return {name: p for group in self.groups for name, p in group.parameters.items()}

    @property
    def num_trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def num_base(self) -> int:
        """How many numbers the model has without the adapters that it hosts."""
        named = self.model.named_parameters()
        return sum(parameter.numel() for name, parameter in named if ADAPTERS not in name)

    @property
    def num_total(self) -> int:
        """How many numbers the run's own model has: the base's and those of its adapter."""
        return self.num_base + (self.num_trainable if self.route else 0)

    @property
    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """A and B of every adapted module, by the module's name."""
        trained, marker = self.parameters, f".adapters.{ADAPTER_NAME}."
        modules = [n.removesuffix(f"{marker}A") for n in trained if n.endswith(f"{marker}A")]
        return {m: (trained[f"{m}{marker}A"], trained[f"{m}{marker}B"]) for m in modules}

    def start_hash(self) -> str | None:
        """SHA-256 of the present A and B, where they were made from data or decompositions.

        Before the first step it says whether a resumed run starts where the first one did.
        """
        is_kept = self.adapter is not None and self.method.init in KEPT
        return start_hash(self.pairs) if is_kept else None

    def keep_start(self, path: Path) -> None:
        """Write what `start_hash` hashes, for `prepare(..., start=path)`. Call before training."""
        if self.adapter is not None and self.method.init in KEPT:
            write_start(path, self.adapter, self.pairs)

    def routed(self) -> AbstractContextManager[object]:
        """The context in which the model's forward is the one that is trained."""
        return nullcontext() if self.route is None else use(self.model, self.route)


def prepare(
    model: nn.Module,
    method: MethodSection,
    training: TrainingSection,
    *,
    task: Task | MakesObjective,
    rows: Sequence[Row] = (),
    start: Path | None = None,
    device: torch.device | None = None,
    name: str = ADAPTER_NAME,
) -> Trainable:
    """Move `model` to its device, freeze what `method` freezes, attach what it attaches.

    `lora` adds an adapter and gives it its own trained copy of the head; `full` trains all;
    `frozen` leaves out the lowest blocks (and the embedding, a setting); `head` trains the head
    alone. Biases and norms (fewer than two dimensions) have no weight decay.

    rows: training rows, for initialisers that look at data (`eva`, `lora_ga`).
    task: what the loss is; of rows that are no text, what makes their objective.
    start: where `Trainable.keep_start` wrote what the run began with; used if it is there.
    device: instead of the one that `training.device` names ("meta": shapes, for plans).
    name: what a LoRA run's adapter is called; a model that trains several hosts one a run.

    Raises `ConfigError` and `ModelError` for settings that the model cannot follow, `TargetError`
    for targets and patterns that match nothing, `ResumeError` for a damaged `start`.
    """
    use_threads(training)
    device = choose_device(training.device) if device is None else device
    model.to(device)
    head = head_name(model) if task == "classification" else None
    route, num_frozen, adapter = None, 0, None
    match method.kind:
        case "lora":
            route = name
            adapter = _attach(model, method, training, task, head, rows, start, name)
            chosen = adapter_parameters(model, route)
            num_frozen = 0 if callable(task) else len(blocks(model)[1])
        case "full":
            chosen = dict(model.named_parameters())
        case "frozen":
            half = len(blocks(model)[1]) // 2
            num_frozen = half if method.frozen_layers is None else method.frozen_layers
            lower = lower_parameters(model, num_frozen, embedding=method.freeze_embedding)
            chosen = {n: p for n, p in model.named_parameters() if n not in lower}
        case "head":
            if head is None:
                raise ConfigError(
                    "method.kind 'head' needs a classification head, and this task has none",
                    "choose lora, frozen or full, or set model.task to 'classification'.",
                )
            num_frozen = len(blocks(model)[1])
            chosen = {n: p for n, p in model.named_parameters() if _inside(n, head)}
    for full_name, parameter in model.named_parameters():
        if route is None or ADAPTERS not in full_name:  # other runs' adapters train, too
            parameter.requires_grad_(full_name in chosen)
    if route is not None:
        chosen = {_as_alone(n, route): parameter for n, parameter in chosen.items()}
    if training.activation_checkpointing:
        enable_activation_checkpointing(model)
    if training.offload_activations and device_kind(device) == "cpu":
        raise ConfigError(
            "training.offload_activations moves activations to the host, where they are already",
            "set it to false, or training.activation_checkpointing to true.",
        )
    if training.compile == "on" and (
        training.activation_checkpointing or training.offload_activations
    ):
        raise ConfigError(
            "training.compile does not go with activation_checkpointing or offload_activations",
            "set training.compile to 'off', or the other to false.",
        )
    return Trainable(
        model=model,
        task=task,
        method=method,
        training=training,
        groups=_groups(chosen, head, method, training, "adapter" if route else "base"),
        route=route,
        head=head,
        num_frozen_blocks=num_frozen,
        device=device,
        adapter=adapter,
    )


def _attach(
    model: nn.Module,
    method: MethodSection,
    training: TrainingSection,
    task: Task | MakesObjective,
    head: str | None,
    rows: Sequence[Row],
    start: Path | None,
    name: str,
) -> LoRAConfig:
    config, starts = lora_config(method, head), None
    if start is not None and start.is_file():
        starts, config = read_start(start, config)
    elif method.init in FROM_DATA and not next(model.parameters()).is_meta:
        if callable(task):
            raise ConfigError(
                f"method.init {method.init!r} looks at rows of text, and these are none",
                "choose kaiming, gaussian, orthogonal, pissa or olora.",
            )
        texts = text_rows(rows)
        starts, config = starts_from_data(model, config, method, training, task=task, rows=texts)
    seed = stream_seed(training.seed, "initialisation")
    attach(model, config, name=name, seed=seed, starts=starts)
    marker = f"{ADAPTERS}{name}.A"
    names = adapter_parameters(model, name)
    try:
        check_patterns(config, [n.removesuffix(marker) for n in names if n.endswith(marker)])
    except TargetError:
        detach(model, name)
        raise
    return config


def _groups(
    chosen: dict[str, nn.Parameter],
    head: str | None,
    method: MethodSection,
    training: TrainingSection,
    body: str,
) -> tuple[ParameterGroup, ...]:
    rates = {
        body: training.learning_rate,
        "adapter_B": training.learning_rate * method.loraplus_lr_ratio,
        "head": training.head_learning_rate or training.learning_rate,
    }
    has_ratio = method.loraplus_lr_ratio != 1
    sorted_out: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in chosen.items():
        role = body
        if head is not None and _inside(name, head):
            role = "head"
        elif has_ratio and name.endswith(f".adapters.{ADAPTER_NAME}.B"):
            role = "adapter_B"
        sorted_out.setdefault((role, parameter.ndim >= 2), {})[name] = parameter
    return tuple(
        ParameterGroup(
            role=role,
            parameters=members,
            learning_rate=rates[role],
            weight_decay=training.weight_decay if decays else 0.0,
        )
        for (role, decays), members in sorted_out.items()
    )


def _as_alone(parameter: str, route: str) -> str:
    """A trained parameter's name in a model that hosts this adapter alone."""
    return parameter.replace(f"{ADAPTERS}{route}.", f"{ADAPTERS}{ADAPTER_NAME}.")


def _inside(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")
