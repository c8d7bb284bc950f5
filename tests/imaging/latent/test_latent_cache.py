"""Latents are computed once, are what the VAE says, and never another image's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_pipelines import SIDE, save_images, save_pipeline

from loralab.errors import DataError, ModelError
from loralab.imaging.latent import (
    LatentBase,
    encode_captions,
    encode_pictures,
    frame,
    open_base,
    read_pictures,
)


def opened(folder: Path) -> LatentBase:
    return open_base(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def encode(base: LatentBase, folder: Path, side: int = SIDE, **more: Any):
    return encode_pictures(base, read_pictures(folder, prompt="x"), side, **more)


def test_a_latent_is_what_the_vae_says(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_images(tmp_path / "images", 2)
    base = opened(pipelines["sd"])
    found = encode(base, tmp_path / "images")
    vae = AutoencoderKL.from_pretrained(pipelines["sd"] / "vae")
    pixels = torch.stack([frame(picture.path, SIDE).pixels for picture in found.pictures])
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    for number, latent in enumerate(found.latents):
        torch.testing.assert_close(latent.mean, expected.mean[number], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(latent.std, expected.std[number], rtol=1e-5, atol=1e-5)
    assert found.latents[1].original == (18, 24)


def test_a_second_run_needs_no_vae(
    tmp_path: Path, pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    save_images(folder, 3)
    base = opened(pipelines["sd"])
    first = encode(base, folder)
    assert first.num_computed == 3
    with monkeypatch.context() as patch:
        patch.setattr(LatentBase, "vae", lambda _: pytest.fail("the VAE was loaded"))
        again = encode(base, folder)
    assert again.num_computed == 0
    for one, other in zip(first.latents, again.latents, strict=True):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
        assert (one.key, one.original, one.corner) == (other.key, other.original, other.corner)


def test_another_image_size_or_vae_is_another_latent(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    folder = tmp_path / "images"
    save_images(folder, 3)
    base = opened(pipelines["sd"])
    first = encode(base, folder)
    Image.new("RGB", (20, 20), "black").save(folder / "1.png")
    changed = encode(base, folder)
    assert changed.num_computed == 1
    assert [a.key == b.key for a, b in zip(first.latents, changed.latents, strict=True)] == [
        True,
        False,
        True,
    ]
    assert encode(base, folder, 2 * SIDE).num_computed == 3
    other = tmp_path / "other"
    shutil.copytree(pipelines["sd"], other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert encode(opened(other), folder).num_computed == 3


def test_a_damaged_latent_is_computed_again(
    tmp_path: Path, own_cache: Path, pipelines: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    save_images(tmp_path / "images", 2)
    base = opened(pipelines["sd"])
    first = encode(base, tmp_path / "images")
    file = next(own_cache.glob(f"latents/*/{first.latents[0].key}.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    again = encode(base, tmp_path / "images")
    assert again.num_computed == 1 and "is damaged and computed again" in caplog.text
    assert torch.equal(again.latents[0].mean, first.latents[0].mean)


def test_images_that_cannot_be_read_are_all_named(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    folder = tmp_path / "images"
    save_images(folder, 3)
    (folder / "sub").mkdir()
    whole = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "sub" / "text.jpg").write_text("no image")
    base = opened(pipelines["sd"])
    with pytest.raises(DataError, match="2 images cannot be read") as raised:
        encode(base, folder)
    assert "broken.png: " in raised.value.cause and "sub/text.jpg: " in raised.value.cause
    assert "images.skip_unreadable" in raised.value.next_step
    skipping = encode(base, folder, skip_unreadable=True)
    assert [picture.name for picture in skipping.pictures] == ["0.png", "1.png", "2.png"]
    assert len(skipping.skipped) == 2


def test_a_folder_of_nothing_but_unreadable_images_is_no_training(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"an image cannot be read: a\.png"):
        encode(opened(pipelines["sd"]), tmp_path, skip_unreadable=True)


def test_a_resolution_that_the_base_cannot_take_is_refused(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    save_images(tmp_path, 1)
    with pytest.raises(ModelError, match="18 x 18 pixels do not fit") as raised:
        encode(opened(pipelines["sd"]), tmp_path, 18)
    assert raised.value.next_step == "set images.resolution to 16."


def test_a_caption_is_encoded_once_and_alone(
    pipelines: dict[str, Path],
) -> None:
    base = opened(pipelines["sd"])
    found = encode_captions(base, ["a cat", "a dog", "a cat"])
    assert list(found) == ["a cat", "a dog"]
    alone = encode_captions(base, ["a dog"])["a dog"]
    assert torch.equal(alone.hidden, found["a dog"].hidden) and alone.pooled is None
    assert not alone.was_cut
    assert encode_captions(base, ["word " * 20])["word " * 20].was_cut


def test_a_pipeline_that_cannot_be_trained_says_everything(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    def changed(name: str, part: str, **values: Any) -> Path:
        import json

        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(pipelines["sd"], folder)
        file = folder / part
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return folder

    with pytest.raises(ModelError, match=r"no model_index\.json in it"):
        opened(tmp_path)
    with pytest.raises(ModelError, match="there is no pipeline folder no/such/place"):
        opened(Path("no/such/place"))
    with pytest.raises(ModelError, match="is a StableDiffusion3Pipeline; trained here are"):
        opened(changed("three", "model_index.json", _class_name="StableDiffusion3Pipeline"))
    folder = changed("odd", "unet/config.json", in_channels=9, cross_attention_dim=32)
    changed("odd", "scheduler/scheduler_config.json", prediction_type="flow")
    changed("odd", "vae/config.json", latents_mean=[0.0])
    with pytest.raises(ModelError) as raised:
        opened(folder)
    for said in (
        "the UNet's in_channels is 9, latents have 4 channels",
        "the UNet reads text of width 32, the text encoders give 8",
        "the VAE shifts its latents",
        "its scheduler predicts 'flow'",
    ):
        assert said in raised.value.cause
    folder = changed("bare", "model_index.json", vae=["custom", "MyVAE"])
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"unet/ has no safetensors file; its vae is a MyVAE"):
        opened(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.bin"):
        opened(folder)
    folder = changed("sampler", "scheduler/scheduler_config.json", _class_name="Mine")
    with pytest.raises(ModelError, match="names no scheduler of diffusers"):
        opened(folder)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_pipeline(tmp_path, "sd")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be read"):
        opened(tmp_path).unet()
