"""Which attention a training step runs on the CPU in half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loralab.fusion import SHORT_ROW_TOKENS
from loralab.placement import device_kind


@contextmanager
def training_attention(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Inside, forward and backward of rows padded to `num_tokens` use the faster attention.

    On the CPU torch's flash kernel is slow in half precision, backward above all: at 27 tokens
    18 ms a layer against 4 ms for plain products (SmolLM2, batch 16, one core), a fifth of a LoRA
    step. So short rows go through transformers' "eager" attention. The choice depends on the
    batch's width alone, and validation and predictions keep the model's own attention.
    """
    config: Any = getattr(model, "config", None)
    if num_tokens > SHORT_ROW_TOKENS or not _is_slow(model, config):
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _is_slow(model: nn.Module, config: Any) -> bool:
    parameter = next(model.parameters())
    is_half = parameter.dtype in (torch.bfloat16, torch.float16)
    own = getattr(config, "_attn_implementation", None)
    return is_half and device_kind(parameter) == "cpu" and own == "sdpa"
