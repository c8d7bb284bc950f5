"""Noise that a row's name decides: losses of images that are the same at every call."""

import hashlib

import torch

EVALUATION_TIMESTEPS = 4
"""Timesteps that a row is scored at, one from each quarter of the schedule."""


def generator_of(name: str) -> torch.Generator:
    """The generator of a row's noise and timesteps."""
    digest = hashlib.sha256(f"denoising:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
