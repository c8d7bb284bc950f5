"""The fast runner: one decoding step for tokens of many adapters, on a cache of its own."""

from loralab.serving.fast.runner import FastRunner, fast_runner
from loralab.serving.fast.whole_numbers import Precision

__all__ = ["FastRunner", "Precision", "fast_runner"]
