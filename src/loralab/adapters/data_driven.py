"""Initialisers that are made from data: EVA from the inputs of each target, LoRA-GA from gradients.

Both return strategies for `attach(..., starts=...)`, by module name.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.adapters.layers import CONVOLUTION, EMBEDDING, Path, path_of
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.targets import excluding, select, walk
from loralab.errors import AdapterError
from loralab.lowrank import (
    Initialiser,
    InputSpectrum,
    allocate_ranks,
    eva,
    input_spectrum,
    lora_ga,
)

Batches = Iterable[Any]  # each the keyword inputs of a forward, its positional inputs, or its input


def eva_starts(
    model: nn.Module, config: LoRAConfig, batches: Batches, *, redistribute: bool = True
) -> tuple[dict[str, Initialiser], LoRAConfig]:
    """EVA (2410.07170): A = the leading directions of each target's inputs over the batches.

    Returns the strategies and the config to attach with: with `redistribute` the rank budget goes
    to the modules whose directions explain most, at most twice the rank each; those that get none
    are excluded. Raises `AdapterError` for targets whose inputs are no vectors.
    """
    names, _ = select(model, config)
    modules = dict(walk(model))
    _refuse("EVA", [n for n in names if path_of(modules[n]) in (EMBEDDING, CONVOLUTION)])
    kept = 2 * config.rank if redistribute else config.rank
    spectra: dict[str, InputSpectrum] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach().flatten(0, -2)
            spectra[name] = input_spectrum(rows, kept, spectra.get(name))

        return note

    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        with torch.no_grad():
            for batch in batches:
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    _refuse("EVA", [name for name in names if name not in spectra], "got no input")
    starts = {name: eva(spectra[name]) for name in names}
    if not redistribute:
        return starts, config
    ranks = allocate_ranks({name: spectra[name].explained_variance for name in names}, config.rank)
    pattern = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank}
    without = tuple(name for name, rank in ranks.items() if rank == 0)
    changed = excluding(replace(config, rank_pattern=pattern), without)
    return {name: starts[name] for name, rank in ranks.items() if rank}, changed


def lora_ga_starts(
    model: nn.Module,
    config: LoRAConfig,
    batches: Batches,
    loss: Callable[[Any], Tensor] = lambda output: output.loss,
    gamma: float = 16.0,
) -> dict[str, Initialiser]:
    """LoRA-GA (2407.05000): the first step comes closest to full fine-tuning's on these batches.

    loss: model output -> scalar. One fp32 gradient is held for each target; the base and its flags
    are as before afterwards. Raises `AdapterError` for a target that got no gradient.
    """
    names, _ = select(model, config)
    modules = dict(walk(model))
    sums: dict[str, Tensor] = {}
    with _only_trainable(model, {name: _weight(modules[name]) for name in names}) as weights:
        for batch in batches:
            found = torch.autograd.grad(
                loss(_run(model, batch)), list(weights.values()), allow_unused=True
            )
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    sums[name] = sums.get(name, 0) + gradient.float()
    _refuse("LoRA-GA", [name for name in names if name not in sums], "got no gradient")
    return {name: lora_ga(_as_matrix(modules[name], sums[name]), gamma) for name in names}


def _weight(module: nn.Module) -> nn.Parameter:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    return cast(nn.Parameter, module._parameters[name])


def _as_matrix(module: nn.Module, gradient: Tensor) -> Tensor:
    matrix = cast(Path, path_of(module)).matrix(module)
    return gradient.as_strided(matrix.shape, matrix.stride()).contiguous()


@contextmanager
def _only_trainable(
    model: nn.Module, weights: dict[str, nn.Parameter]
) -> Iterator[dict[str, nn.Parameter]]:
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = {id(weight) for weight in weights.values()}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield weights
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _refuse(method: str, names: list[str], why: str = "has no input vectors") -> None:
    if names:
        raise AdapterError(
            f"{method}: {', '.join(names[:5])} {why}", "leave these out with `exclude`."
        )
