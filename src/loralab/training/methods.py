"""Which parameters a method trains, at which learning rate, with which decay."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from loralab.adapters import LoRAConfig, adapter_parameters, attach, use
from loralab.config import MethodSection, Task, TrainingSection
from loralab.errors import ConfigError
from loralab.models import blocks, enable_activation_checkpointing, head_name, lower_parameters
from loralab.training.devices import choose_device, use_threads
from loralab.training.streams import stream_seed

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a role, a learning rate and a weight decay."""

    role: str  # "base", "adapter" or "head"
    parameters: dict[str, nn.Parameter]  # by their names in the model
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Trainable:
    """A model made ready for one method: who trains, at which rate, along which route."""

    model: nn.Module
    task: Task
    method: MethodSection
    training: TrainingSection
    groups: tuple[ParameterGroup, ...]
    route: str | None  # the adapter's name; None where the base itself trains
    head: str | None  # the head's module name; None for causal models
    num_frozen_blocks: int  # blocks from the bottom that do not train
    device: torch.device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name."""
        return {name: p for group in self.groups for name, p in group.parameters.items()}

    @property
    def num_trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def routed(self) -> AbstractContextManager[object]:
        """The context in which the model's forward is the one that is trained."""
        return nullcontext() if self.route is None else use(self.model, self.route)


def prepare(
    model: nn.Module, method: MethodSection, training: TrainingSection, *, task: Task
) -> Trainable:
    """Move `model` to its device, freeze what `method` freezes, attach what it attaches.

    `lora` adds an adapter and gives it its own trained copy of the head; `full` trains all;
    `frozen` leaves out the lowest blocks (and the embedding, a setting); `head` trains the head
    alone. Biases and norms (fewer than two dimensions) have no weight decay.

    Raises `ConfigError` and `ModelError` for settings that the model cannot follow, `TargetError`
    for targets that match nothing.
    """
    use_threads(training)
    device = choose_device(training.device)
    model.to(device)
    head = head_name(model) if task == "classification" else None
    route, num_frozen = None, 0
    match method.kind:
        case "lora":
            route = ADAPTER_NAME
            chosen = _attach(model, method, training, head)
            num_frozen = len(blocks(model)[1])
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
                    "method.kind 'head' needs a classification head, and model.task is 'causal'",
                    "choose lora, frozen or full, or set model.task to 'classification'.",
                )
            num_frozen = len(blocks(model)[1])
            chosen = {n: p for n, p in model.named_parameters() if _inside(n, head)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    if training.activation_checkpointing:
        enable_activation_checkpointing(model)
    return Trainable(
        model=model,
        task=task,
        method=method,
        training=training,
        groups=_groups(chosen, head, training, "adapter" if route else "base"),
        route=route,
        head=head,
        num_frozen_blocks=num_frozen,
        device=device,
    )


def _attach(
    model: nn.Module, method: MethodSection, training: TrainingSection, head: str | None
) -> dict[str, nn.Parameter]:
    heads = [head] if head and head not in method.whole_modules else []
    config = LoRAConfig(
        rank=method.rank,
        alpha=method.alpha,
        targets=method.targets,
        exclude=tuple(method.exclude),
        dropout=method.dropout,
        scaling=method.scaling,
        init=method.init,
        whole_modules=(*heads, *method.whole_modules),
    )
    attach(model, config, name=ADAPTER_NAME, seed=stream_seed(training.seed, "initialisation"))
    return adapter_parameters(model, ADAPTER_NAME)


def _groups(
    chosen: dict[str, nn.Parameter], head: str | None, training: TrainingSection, body: str
) -> tuple[ParameterGroup, ...]:
    head_rate = training.head_learning_rate or training.learning_rate
    sorted_out: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in chosen.items():
        role = "head" if head is not None and _inside(name, head) else body
        sorted_out.setdefault((role, parameter.ndim >= 2), {})[name] = parameter
    return tuple(
        ParameterGroup(
            role=role,
            parameters=members,
            learning_rate=head_rate if role == "head" else training.learning_rate,
            weight_decay=training.weight_decay if decays else 0.0,
        )
        for (role, decays), members in sorted_out.items()
    )


def _inside(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")
