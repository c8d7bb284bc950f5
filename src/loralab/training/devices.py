"""Where a training runs, and on how many threads."""

import torch

from loralab.config import TrainingSection
from loralab.errors import ConfigError


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else MPS, else the CPU; any other name is taken as given.

    Raises `ConfigError` for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return torch.device(_available()[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"training.device {name!r} is no device that torch knows",
            "use auto, cpu, cuda, cuda:1 or mps.",
        ) from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in _available() or (device.index or 0) >= count:
        raise ConfigError(
            f"training.device {name!r} is not on this machine (it has {', '.join(_available())})",
            "use auto, or one of those.",
        )
    return device


def use_threads(training: TrainingSection) -> int:
    """Set torch's number of CPU threads where the settings name one; the number in use."""
    if training.threads is not None and training.threads != torch.get_num_threads():
        torch.set_num_threads(training.threads)
    return torch.get_num_threads()


def _available() -> list[str]:
    found = ["cuda"] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]
