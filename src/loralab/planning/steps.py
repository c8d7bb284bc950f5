"""The steps that can be traced: this project's own, and plain PEFT's."""

import copy
import dataclasses
import importlib.util
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, cast

import torch
from torch import nn

from loralab.adapters import adapter_parameters, dropout_tables
from loralab.config import RunConfig, TrainingSection
from loralab.data import Encoded, collate
from loralab.errors import PlanError
from loralab.models import enable_activation_checkpointing, head_name, quiet
from loralab.planning.blocks import Run, find_runs, kept_blocks, renumber_blocks
from loralab.planning.sources import drawn_model, meta_model
from loralab.planning.trace import Tracer
from loralab.training import Trainable, prepare, repeatable_step

Step = Callable[[], object]


StepKind = Literal["own", "peft"]
ModelSource = nn.Module | Callable[[], nn.Module]


class Traceable(ABC):
    """A model on the meta device, its runs of alike blocks, and the step that trains it.

    `ready` cuts the model down to the kept blocks, puts fake tensors in the place of its weights
    and gives the step on `rows`. `config` may differ in batch and length alone from the settings
    that the model was made for.
    """

    model: nn.Module
    runs: list[Run]
    num_trained: int  # parameters

    @abstractmethod
    def ready(
        self, tracer: Tracer, runs: Sequence[Run], config: RunConfig, rows: Sequence[Encoded]
    ) -> "Ready":
        """The step of the cut model, to be run in the tracer's world."""


@dataclass(frozen=True)
class Ready:
    """A step that can be traced. `before` is run first: what a training holds between steps."""

    step: Step
    model: nn.Module
    before: Step


def traceable(config: RunConfig, kind: StepKind, source: ModelSource | None = None) -> Traceable:
    """The step of `config`: this project's, or plain PEFT's and transformers'.

    Raises `PlanError` for "peft" where PEFT is not installed, and what `meta_model` and `prepare`
    raise.
    """
    model = meta_model(config, source)
    if kind == "peft":
        return PlainStep(config, model)
    return OwnStep(_own(config, model))


def _own(config: RunConfig, model: nn.Module) -> Trainable:
    meta = torch.device("meta")
    return prepare(model, config.method, config.training, task=config.model.text_task, device=meta)


def nothing() -> None:
    """A step of this project makes its optimiser's state when it is built."""


class OwnStep(Traceable):
    """This project's own training step, from `training.repeatable_step`."""

    def __init__(self, trainable: Trainable) -> None:
        self._trainable = trainable
        self.model = trainable.model
        self.runs = find_runs(self.model)
        self.num_trained = trainable.num_trainable

    def ready(
        self, tracer: Tracer, runs: Sequence[Run], config: RunConfig, rows: Sequence[Encoded]
    ) -> Ready:
        model, fakes = faked(self.model, tracer, runs)
        cut = cut_down(self._trainable, model, fakes, config.training)
        if cut.route is not None:
            tracer.label(adapter_parameters(model, cut.route).values(), "adapters")
        tracer.label(fakes.values(), "weights")
        with tracer.building():
            if cut.route is not None:
                tracer.label(dropout_tables(model, cut.route), "dropout table")
            return Ready(repeatable_step(cut, rows), model, before=nothing)


def cut_down(
    whole: Trainable, model: nn.Module, fakes: Mapping[int, Any], training: TrainingSection
) -> Trainable:
    """The trainable on a model of fewer blocks, whose tensors `fakes` has by the whole one's id."""
    groups = (
        dataclasses.replace(
            group,
            parameters={n: fakes[id(p)] for n, p in group.parameters.items() if id(p) in fakes},
        )
        for group in whole.groups
    )
    return dataclasses.replace(
        whole,
        model=model,
        groups=tuple(group for group in groups if group.parameters),
        training=training,
        device=torch.device("cpu"),
    )


class PlainStep(Traceable):
    """The loop everybody writes: forward, backward, clip, AdamW, with PEFT where LoRA is wanted."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        self._is_adapted = config.method.kind == "lora"
        self._keeps_cache = _keeps_cache(model) and not config.training.activation_checkpointing
        self.model = _peft_model(config, model) if self._is_adapted else _own(config, model).model

        self.runs = find_runs(self.model)
        self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def ready(
        self, tracer: Tracer, runs: Sequence[Run], config: RunConfig, rows: Sequence[Encoded]
    ) -> Ready:
        model, fakes = faked(self.model, tracer, runs)
        if self._is_adapted:
            tracer.label((p for p in model.parameters() if p.requires_grad), "adapters")
        tracer.label(fakes.values(), "weights")
        return _plain_step(config, model, rows, torch.device("cpu"), keeps_cache=self._keeps_cache)


def real_step(config: RunConfig, kind: StepKind, device: torch.device) -> Step:
    """The same step in earnest, with random weights on `device`: what verifies a plan."""
    model = drawn_model(config, device)
    rows = rows_for(config)
    keeps_cache = _keeps_cache(model) and not config.training.activation_checkpointing
    if kind == "own" or config.method.kind != "lora":
        trainable = prepare(
            model,
            config.method,
            config.training,
            task=config.model.text_task,
            device=device,
            rows=_varied(rows, model),
        )
        if kind == "own":
            return repeatable_step(trainable, rows)
    else:
        model = _peft_model(config, model)
    ready = _plain_step(config, model, rows, device, keeps_cache=keeps_cache)
    ready.before()
    return ready.step


def faked(
    model: nn.Module, tracer: Tracer, runs: Sequence[Run]
) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the model with the kept blocks and fake weights; the fakes by the originals' id."""
    with kept_blocks(model, runs):
        tensors = {
            id(tensor): tensor
            for module in model.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        fakes = {key: tracer.stand_in(tensor) for key, tensor in tensors.items()}
        cut = copy.deepcopy(model, dict(fakes))
    renumber_blocks(cut)
    return cut, fakes


def _keeps_cache(model: nn.Module) -> bool:
    """Whether a plain forward fills a key-value cache, as transformers' decoders do by default.

    Nobody reads it, and it lives until the forward ends: 0.25 GiB of the seed run's peak.
    """
    base = getattr(model, "base_model", model)
    takes = "use_cache" in inspect.signature(base.forward).parameters
    return takes and bool(getattr(getattr(model, "config", None), "use_cache", False))


def _plain_step(
    config: RunConfig,
    model: nn.Module,
    rows: Sequence[Encoded],
    device: torch.device,
    *,
    keeps_cache: bool,
) -> Ready:
    training = config.training
    more = {"use_cache": True} if keeps_cache else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True if training.fused else None,
    )
    size = training.batch_size
    batches = [collate(rows[at : at + size], pad_id=0) for at in range(0, len(rows), size)]
    model.train()

    def before() -> None:
        """AdamW makes its state at its first step."""
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad()

    def step() -> None:
        for batch in batches:
            loss = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                labels=batch.labels.to(device),
                **more,
            ).loss
            (loss / len(batches)).backward()
            del loss
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()

    return Ready(step, model, before)


_PEFT_BIASES: dict[str, Any] = {"none": "none", "targets": "lora_only", "all": "all"}


def _peft_model(config: RunConfig, model: nn.Module) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise PlanError(
            "PEFT is not installed, so its step cannot be planned",
            "install it with `pip install 'loralab[peft]'`, or plan with --step own.",
        )
    import peft

    method, task = config.method, config.model.text_task
    heads = [head_name(model)] if task == "classification" else []
    settings = peft.LoraConfig(
        r=method.rank,
        lora_alpha=round(method.alpha),
        lora_dropout=method.dropout,
        use_rslora=method.scaling == "alpha/sqrt(rank)",
        use_dora=method.dora,
        bias=_PEFT_BIASES[method.biases],
        layers_to_transform=method.layers,
        rank_pattern=dict(method.rank_pattern),
        target_modules=method.targets,
        exclude_modules=list(method.exclude) or None,
        modules_to_save=[*heads, *method.whole_modules] or None,
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
    )
    if config.training.activation_checkpointing:
        enable_activation_checkpointing(model)
    device = next(model.parameters()).device
    with device, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's use of transformers, Conv1D's layout
        try:
            return peft.get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise PlanError(
                f"PEFT refuses these settings: {error}", "change method.targets, or use --step own."
            ) from error


def rows_for(config: RunConfig) -> list[Encoded]:
    """A step's rows, as long as `data.max_tokens` allows.

    All but the first are one token shorter: real batches have padding, and with it attention
    takes another kernel than without.
    """
    count = config.training.batch_size * config.training.accumulation
    longest = config.data.max_tokens
    return [_row(config, index, longest - (index > 0 and longest > 1)) for index in range(count)]


def _varied(rows: Sequence[Encoded], model: nn.Module) -> list[Encoded]:
    """Rows of the same lengths with ids from all of the vocabulary, for starts made from data.

    One token over and over has one direction: EVA would leave most modules without a rank.
    """
    vocabulary = range(cast(Any, model).get_input_embeddings().num_embeddings)
    draws = Random(0)
    return [
        dataclasses.replace(row, input_ids=tuple(draws.choices(vocabulary, k=len(row.input_ids))))
        for row in rows
    ]


def _row(config: RunConfig, index: int, length: int) -> Encoded:
    ids = (1,) * length
    name = f"plan-{index}"
    if config.model.task == "classification":
        return Encoded(id=name, group=name, input_ids=ids, label=index % config.model.num_labels)
    return Encoded(id=name, group=name, input_ids=ids, targets=ids)
