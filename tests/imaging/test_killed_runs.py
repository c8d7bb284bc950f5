"""Processes that are killed outright (`kill -9`) go on to what they would have made."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_styles import recipe, tiny_base

pytestmark = pytest.mark.slow

OF_A_BASE = """
from loralab.imaging import BaseRecipe, digits_base
tiny = BaseRecipe(channels=(16, 16), num_steps=150, batch_size=8)
print(digits_base(tiny, device="cpu", threads=1))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def finish(*arguments: str) -> str:
    process = start(*arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return said


def kill(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    """Kill it as soon as that is so; it must not have ended before."""
    while not when():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -9


def test_styles(tmp_path: Path) -> None:
    config = recipe(
        tiny_base(tmp_path / "base"),
        *("training.max_steps=60", "training.checkpoint_steps=20", "training.epochs=50"),
    )
    (tmp_path / "r.toml").write_text(config.to_toml())
    train = "-m", "loralab", "train"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(*train, str(tmp_path / "r.toml"), "--output", str(whole))
    journal = cut / "checkpoints" / "chalk" / "metrics.jsonl"
    process = start(*train, str(tmp_path / "r.toml"), "--output", str(cut))
    kill(process, lambda: journal.is_file() and len(journal.read_bytes().splitlines()) > 25)
    finish(*train, "--resume", str(cut))
    for name in ("bold", "chalk"):
        files = sorted(path.name for path in (whole / name).iterdir())
        assert files == sorted(path.name for path in (cut / name).iterdir())
        for file in files:
            assert (whole / name / file).read_bytes() == (cut / name / file).read_bytes()
    for file in ("metrics.jsonl", "grid.png"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()


def test_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "whole"))
    wanted = (Path(finish("-c", OF_A_BASE).strip()) / weights).read_bytes()
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cut"))
    trained = tmp_path / "cut" / "trained"
    kill(start("-c", OF_A_BASE), lambda: any(trained.glob(".*/checkpoints/step-*")))
    assert not list(trained.glob("digits-diffusion-*/training.json"))
    base = Path(finish("-c", OF_A_BASE).strip())
    assert (base / weights).read_bytes() == wanted
    assert [path.name for path in trained.iterdir() if path.is_dir()] == [base.name]
