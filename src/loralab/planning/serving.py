"""Memory of serving many adapters, and what many tasks take on disk."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from loralab.config import RunConfig
from loralab.models import num_parameters
from loralab.planning.devices import Device
from loralab.planning.sources import meta_model
from loralab.planning.steps import ModelSource, OwnStep, traceable

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ServingPlan:
    """Serving `num_adapters` adapters of one base, with a cache for `rows` rows of `tokens` tokens.

    separate: one base and the adapters beside it. merged: each adapter in a copy of the base.
    """

    num_adapters: int
    rows: int
    tokens: int
    base_bytes: int
    adapter_bytes: int
    cache_bytes: int
    capacity_bytes: int

    @property
    def separate_bytes(self) -> int:
        """Base, adapters and cache."""
        return self.base_bytes + self.num_adapters * self.adapter_bytes + self.cache_bytes

    @property
    def merged_bytes(self) -> int:
        """A merged model for each adapter, and the cache."""
        return self.num_adapters * self.base_bytes + self.cache_bytes

    @property
    def storage_saved_share(self) -> float:
        """Of the storage of whole models, what one base with adapters saves."""
        together = self.base_bytes + self.num_adapters * self.adapter_bytes
        return 1 - together / (self.num_adapters * self.base_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: memory while serving, and storage of N models against base and adapters."""
        return {
            "num_adapters": self.num_adapters,
            "rows": self.rows,
            "tokens": self.tokens,
            "base_bytes": self.base_bytes,
            "adapter_bytes": self.adapter_bytes,
            "cache_bytes": self.cache_bytes,
            "separate_bytes": self.separate_bytes,
            "separate_fits": self.separate_bytes <= self.capacity_bytes,
            "merged_bytes": self.merged_bytes,
            "merged_fits": self.merged_bytes <= self.capacity_bytes,
            "storage_models_bytes": self.num_adapters * self.base_bytes,
            "storage_adapters_bytes": self.base_bytes + self.num_adapters * self.adapter_bytes,
            "storage_saved_share": self.storage_saved_share,
        }


def plan_serving(
    config: RunConfig,
    device: Device,
    *,
    num_adapters: int,
    model: ModelSource | None = None,
) -> ServingPlan:
    """The plan of serving adapters of `config.method`'s shape, at `model.dtype`'s real bytes.

    Rows and tokens of the cache are `training.batch_size` and `data.max_tokens`; base and adapters
    count in the base's dtype.
    """
    size = BYTES[config.model.dtype]
    base = meta_model(config, model)
    step = traceable(config.replace(method__kind="lora"), "own", model)
    assert isinstance(step, OwnStep)
    return ServingPlan(
        num_adapters=num_adapters,
        rows=config.training.batch_size,
        tokens=config.data.max_tokens,
        base_bytes=num_parameters(base) * size,
        adapter_bytes=step.num_trained * size,
        cache_bytes=cache_bytes(base, config),
        capacity_bytes=device.capacity_bytes - device.context_bytes,
    )


def cache_bytes(model: nn.Module, config: RunConfig) -> int:
    """Bytes of keys and values of all layers: 2 x rows x tokens x heads x width, in the dtype.

    Layers with a sliding window keep that many tokens; models that only encode have none.
    """
    facts: Any = getattr(model, "config", None)
    if facts is None or config.model.task != "causal":
        return 0
    facts = facts.get_text_config()
    heads = getattr(facts, "num_key_value_heads", None) or facts.num_attention_heads
    width = getattr(facts, "head_dim", None) or facts.hidden_size // facts.num_attention_heads
    tokens = config.data.max_tokens
    window = getattr(facts, "sliding_window", None) or tokens
    kinds = getattr(facts, "layer_types", None) or ["full_attention"] * facts.num_hidden_layers
    kept = sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds)
    return 2 * config.training.batch_size * kept * heads * width * BYTES[config.model.dtype]
