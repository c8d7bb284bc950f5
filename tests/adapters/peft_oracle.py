"""PEFT as the oracle; its own warnings are not ours to mend."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def shake(parameters: Any, seed: int = 3, size: float = 0.3) -> None:
    """Random non-zero values in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def peft_reads(model: nn.Module, folder: Path, trainable: bool = False) -> PeftModel:
    """A copy of the model with the folder's adapter, as PEFT reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(
            copy.deepcopy(model), folder, is_trainable=trainable
        ).eval()  # pyright: ignore[reportArgumentType]


def peft_writes(model: nn.Module, folder: Path, seed: int = 5, **settings: Any) -> PeftModel:
    """A copy of the model with a random PEFT adapter, which is saved to the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()  # pyright: ignore[reportArgumentType]
        shake([p for p in theirs.parameters() if p.requires_grad], seed)
        theirs.save_pretrained(folder)
    return theirs


def peft_runs(theirs: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """PEFT's forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs(*args, **kwargs)
