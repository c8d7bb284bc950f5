"""Adapters: values, the modules that host them, routes that say who uses which, PEFT's format."""

from loralab.adapters.adapter import Adapter, Layer
from loralab.adapters.attaching import (
    adapter_parameters,
    attach,
    count_parameters,
    detach,
    extract,
    hosted,
    use,
)
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.peft_format import content_hash, read_adapter, write_adapter
from loralab.adapters.routes import carry
from loralab.adapters.saving import install, load_adapter, save_adapter
from loralab.adapters.settings import LoRAConfig

__all__ = [
    "Adapter",
    "Layer",
    "LoRAConfig",
    "adapter_parameters",
    "attach",
    "carry",
    "content_hash",
    "count_parameters",
    "detach",
    "extract",
    "fingerprint",
    "hosted",
    "install",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "use",
    "write_adapter",
]
