"""Fusion: blocks found by structure, trained as one autograd function each."""

from loralab.fusion.fused import fused
from loralab.fusion.pattern import Matched, matching_blocks

__all__ = ["Matched", "fused", "matching_blocks"]
