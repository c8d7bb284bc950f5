"""The fast runner: one decoding step for tokens of many adapters, on a cache of its own."""

from loralab.serving.fast.runner import FastRunner, fast_runner

__all__ = ["FastRunner", "fast_runner"]
