"""Small configurations as files, since a plan reads names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plan_settings import SMALL


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a small configuration with changes; the path of its config.json."""

    def write(family: str, **changes: object) -> str:
        path = tmp_path / family / "config.json"
        path.parent.mkdir(exist_ok=True)
        facts = {key: value for key, value in {**SMALL[family], **changes}.items() if value != ""}
        path.write_text(json.dumps(facts), encoding="utf-8")
        return str(path)

    return write
