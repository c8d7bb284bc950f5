"""What image models say where something is missing or does not fit."""

import json
import sys
from pathlib import Path

import pytest
import torch

from loralab.errors import ModelError
from loralab.imaging import build_denoiser, load_denoiser, load_digits, save_denoiser, write_grid


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("sklearn.datasets", "diffusers", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=r"scikit-learn, which is not.*\n.*loralab\[images\]"):
        load_digits()
    with pytest.raises(ModelError, match=r"diffusers, which is not.*\n.*loralab\[images\]"):
        build_denoiser()
    with pytest.raises(ModelError, match=r"pillow, which is not.*\n.*loralab\[images\]"):
        write_grid([[torch.zeros(1, 2, 2)]], tmp_path / "grid.png", row_names=["a"])


def test_a_unet_that_takes_no_class_is_refused(tmp_path: Path) -> None:
    save_denoiser(build_denoiser(channels=(16, 32)), tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_class_embeds": None}))
    with pytest.raises(ModelError, match=r"no class-conditional denoiser: it takes no class"):
        load_denoiser(tmp_path / "base")


def test_weights_cut_short_are_named(tmp_path: Path) -> None:
    save_denoiser(build_denoiser(channels=(16, 32)), tmp_path / "base")
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"the UNet in .* cannot be read"):
        load_denoiser(tmp_path / "base")
