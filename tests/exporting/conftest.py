"""A tiny decoder, adapters on it, and servers that apply them rightly and wrongly."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import FakeServer
from tiny_decoder import save_decoder

import loralab
from loralab.adapters import adapter_parameters


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks, saved with its tokenizer."""
    return save_decoder(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def make_adapter(
    decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Path]]:
    """A model with a random adapter named "a", and the adapter's folder."""

    def make(base: Path = decoder, size: float = 0.15, **settings: Any) -> tuple[Any, Path]:
        model = loralab.load_model(str(base), task="causal")
        loralab.attach(model, loralab.LoRAConfig(**{"rank": 4, "alpha": 8, **settings}), name="a")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter_parameters(model, "a").items():
                noise = torch.randn(parameter.shape, generator=generator) * size
                # magnitudes and whole modules stay near what they are
                parameter.add_(noise) if parameter.ndim == 1 else parameter.copy_(noise)
                if name.endswith("weight"):
                    parameter.mul_(0.2 / size)
        folder = tmp_path_factory.mktemp("adapters") / "a"
        loralab.save_adapter(model, "a", folder)
        return model.eval(), folder

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Starts servers that end with the test."""
    started: list[FakeServer] = []

    def start(**settings: Any) -> FakeServer:
        started.append(FakeServer(**settings))
        return started[-1]

    yield start
    for server in started:
        server.close()
