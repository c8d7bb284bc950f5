"""What must be equal for a resumed run to give the same bits."""

import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from loralab.data import Row
from loralab.native import training as native
from loralab.training.methods import ADAPTERS, Trainable
from loralab.training.plan import Plan

FREE_SETTINGS = {"checkpoint_steps", "sinks", "threads", "device"}
"""Settings that do not change the weights, or whose effect `environment` holds."""


def environment(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Versions, machine, kernel, threads and dtypes: all that the bits of a step depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": _device_name(device),
        "kernel": native.build_name(device),
        "threads": torch.get_num_threads(),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
    }


def identity(
    trainable: Trainable,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    plan: Plan,
) -> dict[str, dict[str, Any]]:
    """Environment, settings, data and parameters as JSON values; called before the first step."""
    return {
        "environment": environment(trainable.model, trainable.device),
        "method": trainable.method.model_dump(mode="json"),
        "training": trainable.training.model_dump(mode="json", exclude=FREE_SETTINGS),
        "data": {
            "train_rows": _rows_hash(train_rows),
            "validation_rows": _rows_hash(validation_rows),
            "order_hash": plan.order_hash(),
        },
        "parameters": {
            "trained": _hash(
                [name, list(parameter.shape), str(parameter.dtype)]
                for name, parameter in trainable.parameters.items()
            ),
            "frozen": frozen_hash(trainable),
            "start": trainable.start_hash(),
        },
    }


def _rows_hash(rows: Sequence[Row]) -> str:
    return _hash([row.id, *row.content()] for row in rows)


def frozen_hash(trainable: Trainable) -> str:
    """A hash of 64 numbers of each frozen parameter: another base is not taken for this one."""
    if trainable.base_hash:
        return trainable.base_hash
    trained = trainable.parameters
    return _hash(
        [name, parameter.detach().flatten()[:64].double().tolist()]
        for name, parameter in trainable.model.named_parameters()
        if name not in trained and not (trainable.route and ADAPTERS in name)
    )


def _hash(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
