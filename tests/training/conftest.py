"""Until a test says otherwise: one thread, so that bits repeat on every machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
