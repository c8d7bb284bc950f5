"""Tiny pipelines as folders, made once; a cache of each test's own; one thread."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import save_pipeline

KINDS = ("sd", "xl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORALAB_KERNELS", "off")  # they would be compiled into each new cache
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        save_pipeline(folder / kind, kind)
    return {kind: folder / kind for kind in KINDS}
