"""`load_model`: a name -> a plain transformers model with a head that depends on the seed alone.

`build_model` gives the same structure from a configuration without any weights.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from loralab.errors import ModelError, nearest
from loralab.models.classify import Pooling
from loralab.models.options import Dtype, Options, Task
from loralab.models.precision import choose_dtype
from loralab.models.presets import PRESETS
from loralab.models.quiet import quiet
from loralab.models.resolve import check_weights, model_folder
from loralab.models.structure import head_name

logger = logging.getLogger("loralab")

_DRAWN = "_loralab_drawn"
"""The attribute of a model that names the parameters its folder did not hold."""


def load_model(
    name: str,
    *,
    task: Task = "classification",
    num_labels: int = 2,
    dtype: Dtype = "float32",
    head_bias: bool = False,
    head_dropout: float = 0.0,
    dropout: float | None = None,
    pooling: Pooling = "native",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The model `name` (a catalogue name, a folder that transformers saved, or a hub id).

    It is an instance of the plain transformers class, in evaluation mode. A head that the folder
    does not hold is initialised from `seed` by a generator of its own (the global one is not
    touched) and named in `model._loralab_fresh_head`, which is None otherwise.

    `head_bias` gives a head without bias one (Llama's `score`); a head that has one keeps it.
    `head_dropout` is the dropout in front of the head, `dropout` that of every layer of the base
    (None keeps the model's own). `pooling` is "native" (decoders: each row's last real token;
    encoders: their own; a model saved by loralab: the one it was trained with), "mean" over the
    real tokens or "last". Padding is what the attention mask says, never what an id says.

    Raises `ModelError` for a name that leads nowhere, for weights that are not whole or only
    pickles, and for a model that does not fit the task.
    """
    folder = model_folder(name)
    config = _read_config(folder)
    saved_labels = config.num_labels
    check_weights(folder)
    options = Options(task, num_labels, head_bias, head_dropout, dropout, pooling)
    model_class = options.apply(config)
    dtype = _settled(dtype, device)
    model, info = _read(model_class, folder, config, dtype, saved_labels)
    _check_loaded(model, info, name, task)
    fresh = _initialise(model, info["missing_keys"], seed)
    options.finish(model, fresh)
    return model.to(device)  # pyright: ignore[reportArgumentType]  (its stub drops str)


def build_model(
    architecture: str | Mapping[str, Any] | PretrainedConfig,
    *,
    task: Task = "classification",
    num_labels: int = 2,
    dtype: Dtype = "float32",
    head_bias: bool = False,
    head_dropout: float = 0.0,
    dropout: float | None = None,
    pooling: Pooling = "native",
    seed: int = 0,
    device: str | torch.device = "meta",
) -> PreTrainedModel:
    """A model from configuration alone: a name of `PRESETS`, its facts as a dict with
    `model_type`, or a transformers config (which is copied).

    On the device "meta" (the default) it has shapes and no weights. Elsewhere all its weights
    are drawn from `seed`, and the global generators are left as they were. The other arguments
    are those of `load_model`. Raises `ModelError` for an unknown preset or model type.
    """
    config = _config_of(architecture)
    options = Options(task, num_labels, head_bias, head_dropout, dropout, pooling)
    model_class = options.apply(config)
    drawn_on = "meta" if torch.device(device).type == "meta" else "cpu"
    with quiet(), torch.random.fork_rng(devices=[]), torch.device(drawn_on):
        torch.default_generator.manual_seed(seed)
        model = model_class._from_config(config, dtype=getattr(torch, _settled(dtype, "cpu")))
    options.finish(model, head_name(model) if task == "classification" else None)
    return model.eval().to(device)  # pyright: ignore[reportArgumentType]  (its stub drops str)


def _settled(dtype: Dtype, device: str | torch.device) -> Dtype:
    return cast(Dtype, choose_dtype(str(device)).dtype) if dtype == "auto" else dtype


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{folder}/config.json describes no model that transformers knows: {error}",
            "update transformers where the model is newer than it; models that need code of their "
            "own (trust_remote_code) are not run.",
        ) from error


def _config_of(architecture: str | Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    if isinstance(architecture, PretrainedConfig):
        return copy.deepcopy(architecture)
    facts = dict(_preset(architecture) if isinstance(architecture, str) else architecture)
    model_type = str(facts.pop("model_type", None))
    try:
        return AutoConfig.for_model(model_type, **facts)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"transformers knows no model type {model_type!r}", "give model_type as it does."
        ) from error


def _preset(name: str) -> Mapping[str, Any]:
    if name not in PRESETS:
        raise ModelError(
            f"there is no preset {name!r}; {nearest(name, PRESETS)}",
            "give a preset's name or the facts as a dict with model_type.",
        )
    return PRESETS[name]


def _read(
    model_class: type[PreTrainedModel],
    folder: Path,
    config: PretrainedConfig,
    dtype: Dtype,
    saved_labels: int | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with the folder's weights, and transformers' report of what did not fit."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            loaded = model_class.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        if saved_labels != config.num_labels and "size" in str(error):
            raise ModelError(
                f"{folder} holds a head with {saved_labels} labels, the settings ask for "
                f"{config.num_labels}",
                f"set model.num_labels = {saved_labels}, or give the model it was trained from.",
            ) from error
        raise ModelError(
            f"transformers cannot load {folder}: {error}",
            "check that config.json and the weights belong together.",
        ) from error


def _check_loaded(model: PreTrainedModel, info: dict[str, Any], name: str, task: Task) -> None:
    """Raises for weights that the folder lacks, warns of weights that the model has no use for."""
    allowed = _fresh_parts(model, task)
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith(allowed))
    if lacking:
        what = f"{', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}"
        raise ModelError(
            f"{name} lacks {len(lacking)} weights that {type(model).__name__} needs: {what}",
            "copy or download the model again; an encoder such as BERT cannot do task=causal."
            if task == "causal"
            else "copy or download the model again.",
        )
    unused = sorted(key for key in info["unexpected_keys"] if _belongs_to_base(model, key))
    if unused:
        logger.warning(
            "%s holds %d weights that %s has no place for: %s",
            name,
            len(unused),
            type(model).__name__,
            ", ".join(unused[:4]),
        )


def _belongs_to_base(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight would be part of the base; a folder may name it with or without prefix."""
    first = key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return first in model.base_model._modules and first != "pooler"


def _fresh_parts(model: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """Prefixes of the parameters that may be missing from a folder: everything but the base."""
    if task == "causal":
        return ()
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    pooler = f"{model.base_model_prefix}.pooler."
    return (*(f"{name}." for name in heads), pooler)


def redraw_head(model: PreTrainedModel, seed: int) -> None:
    """Draw what the model's folder did not hold (its head) as `load_model` with `seed` does."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for name in vars(model).get(_DRAWN, ()):
            _draw(model, name, std, generator)


def _initialise(model: PreTrainedModel, missing: Iterable[str], seed: int) -> str | None:
    """Draws the missing parameters from `seed`; returns the head's name where it is among them."""
    names = vars(model)[_DRAWN] = sorted(missing)
    redraw_head(model, seed)
    if not names:
        return None
    head = head_name(model)
    others = sorted({name.rpartition(".")[0] for name in names if not name.startswith(f"{head}.")})
    if others:
        logger.warning(
            "%s: %s not in the folder, freshly initialised", model.name_or_path, ", ".join(others)
        )
    return head if any(name.startswith(f"{head}.") for name in names) else None


def _draw(model: PreTrainedModel, name: str, std: float, generator: torch.Generator) -> None:
    """transformers' own rule: weights of linear layers normal, biases 0, scales of norms 1.

    Drawn in float32 so that every dtype starts from the same numbers.
    """
    parameter = model.get_parameter(name)
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() < 2:
        parameter.fill_(1.0)
    else:
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
