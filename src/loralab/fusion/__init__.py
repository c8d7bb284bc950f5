"""Fusion: blocks found by structure as one autograd function each; losses without logits."""

from loralab.fusion.attention import SHORT_ROW_TOKENS
from loralab.fusion.fused import fused, run_fused
from loralab.fusion.norms import Norm, RMSNorm, norm_of
from loralab.fusion.output import (
    HiddenStatesError,
    frozen_output_layer,
    stopped_at,
    token_nll_sum,
)
from loralab.fusion.pattern import Matched, matching_blocks, read_call
from loralab.fusion.proof import agrees
from loralab.fusion.watching import own_modules

__all__ = [
    "SHORT_ROW_TOKENS",
    "HiddenStatesError",
    "Matched",
    "Norm",
    "RMSNorm",
    "agrees",
    "frozen_output_layer",
    "fused",
    "matching_blocks",
    "norm_of",
    "own_modules",
    "read_call",
    "run_fused",
    "stopped_at",
    "token_nll_sum",
]
