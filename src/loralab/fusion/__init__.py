"""Fusion: blocks found by structure as one autograd function each; losses without logits."""

from loralab.fusion.attention import SHORT_ROW_TOKENS
from loralab.fusion.fused import fused
from loralab.fusion.output import (
    HiddenStatesError,
    frozen_output_layer,
    stopped_at,
    token_nll_sum,
)
from loralab.fusion.pattern import Matched, matching_blocks

__all__ = [
    "SHORT_ROW_TOKENS",
    "HiddenStatesError",
    "Matched",
    "frozen_output_layer",
    "fused",
    "matching_blocks",
    "stopped_at",
    "token_nll_sum",
]
