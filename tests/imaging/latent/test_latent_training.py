"""Styles of Stable Diffusion, trained by the project's own loop and drawn by diffusers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import SIDE, save_images, save_pipeline

from loralab.adapters import extract, load_adapter, save_adapter, use
from loralab.config import MethodSection, TrainingSection
from loralab.errors import ModelError, ResumeError
from loralab.imaging.formats import write_image_adapter
from loralab.imaging.latent import (
    ATTENTION,
    CONVOLUTIONS,
    Drawing,
    LatentBase,
    LatentDenoisingTask,
    LatentRow,
    class_images,
    draw,
    encode_captions,
    encode_pictures,
    latent_rows,
    open_base,
    read_pictures,
)
from loralab.training import StepDone, Trainable, fit, prepare

CLASSES: dict[str, Any] = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
DRAWING = Drawing(SIDE, num_steps=3)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> LatentBase:
    return open_base(str(folder), dtype=dtype, device=torch.device("cpu"))


def rows_of(base: LatentBase, images: Path) -> tuple[LatentRow, ...]:
    pictures = read_pictures(images)
    conditioning = encode_captions(base, [picture.caption for picture in pictures])
    return latent_rows(encode_pictures(base, pictures, SIDE), conditioning, SIDE)


def ready(base: LatentBase, targets: Sequence[str] = ATTENTION, **training: Any) -> Trainable:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 3, "device": "cpu"}
    settings |= {"epochs": 3, "checkpoint_steps": 2, "weight_decay": 0.0, **training}
    return prepare(
        base.unet(),
        MethodSection(rank=4, alpha=8, targets=list(targets)),
        TrainingSection(**settings),
        task=LatentDenoisingTask(base.schedule, scaling=base.scaling),
    )


def trained(
    base: LatentBase,
    rows: Any,
    folder: Path,
    targets: Sequence[str] = ATTENTION,
    **training: Any,
) -> Trainable:
    trainable = ready(base, targets, **training)
    for _ in fit(trainable, rows, (), folder):
        pass
    return trainable


def values(trainable: Trainable) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainable.parameters.items()}


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_trained_style_is_the_same_in_diffusers(
    tmp_path: Path, pipelines: dict[str, Path], kind: str
) -> None:
    """Trained here, written as a LoRA file, loaded by `load_lora_weights`: the same images."""
    save_images(tmp_path / "images")
    base = opened(pipelines[kind])
    rows = rows_of(base, tmp_path / "images")
    trainable = trained(base, rows, tmp_path / "run", [*ATTENTION, *CONVOLUTIONS])
    [[plain, styled]] = draw(base, trainable.model, ["a field"], DRAWING, routes=[None, "default"])
    assert (styled - plain).abs().max() > 1e-2
    write_image_adapter(extract(trainable.model, "default"), tmp_path / "style.safetensors")

    pipe = CLASSES[kind].from_pretrained(pipelines[kind])
    pipe.set_progress_bar_config(disable=True)

    def theirs() -> torch.Tensor:
        image = pipe(
            "a field",
            height=SIDE,
            width=SIDE,
            num_inference_steps=3,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images[0]
        return image * 2 - 1

    torch.testing.assert_close(plain, theirs(), rtol=1e-5, atol=1e-5)
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    torch.testing.assert_close(styled, theirs(), rtol=1e-5, atol=1e-5)

    save_adapter(trainable.model, "default", tmp_path / "adapter")
    fresh = opened(pipelines[kind]).unet()
    load_adapter(fresh, tmp_path / "adapter", "style")
    [[again]] = draw(base, fresh, ["a field"], DRAWING, routes=["style"])
    assert torch.equal(again, styled)


def test_training_lowers_the_loss_of_its_images(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_images(tmp_path / "images")
    base = opened(pipelines["sd"])
    rows = rows_of(base, tmp_path / "images")
    ends = ["conv_in", "conv_out"]
    trainable = trained(base, rows, tmp_path / "run", ends, epochs=12, learning_rate=5e-2)
    task = LatentDenoisingTask(base.schedule, scaling=base.scaling)
    before, after = (
        sum(answer.nll for answer in task(model, route).answers(rows))
        for model, route in ((base.unet(), None), (trainable.model, "default"))
    )
    assert after < 0.9 * before


def test_a_resumed_training_gives_the_same_bits(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_images(tmp_path / "images")
    base = opened(pipelines["xl"])
    rows = rows_of(base, tmp_path / "images")
    whole = trained(base, rows, tmp_path / "whole")
    for event in fit(ready(base), rows, (), tmp_path / "parts"):
        if isinstance(event, StepDone) and event.step == 5:
            break
    parts = trained(base, rows, tmp_path / "parts")
    expected, found = values(whole), values(parts)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_a_run_is_not_resumed_on_changed_images(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_images(tmp_path / "images")
    base = opened(pipelines["sd"])
    for event in fit(ready(base), rows_of(base, tmp_path / "images"), (), tmp_path / "run"):
        if isinstance(event, StepDone) and event.step == 4:
            break
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    with pytest.raises(ResumeError, match=r"data\.train_rows"):
        trained(base, rows_of(base, tmp_path / "images"), tmp_path / "run")


def test_drawing_leaves_training_as_it_was(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    """Images drawn between two steps change no bit of the steps that follow."""
    save_images(tmp_path / "images")
    base = opened(pipelines["sd"])
    rows = rows_of(base, tmp_path / "images")
    expected = values(trained(base, rows, tmp_path / "one"))
    trainable = ready(base)
    for event in fit(trainable, rows, (), tmp_path / "two"):
        if isinstance(event, StepDone) and event.step % 3 == 0:
            draw(base, trainable.model, ["a"], DRAWING, routes=["default"], seed=event.step)
    found = values(trainable)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_adapters_are_fp32_on_a_half_precision_base(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    save_images(tmp_path / "images", 2)
    base = opened(pipelines["xl"], torch.bfloat16)
    rows = rows_of(base, tmp_path / "images")
    trainable = trained(base, rows, tmp_path / "run", epochs=2)
    kinds = {parameter.dtype for parameter in trainable.parameters.values()}
    assert kinds == {torch.float32}
    assert trainable.model.conv_in.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert rows[0].latent.mean.dtype == torch.float32
    [[image]] = draw(base, trainable.model, ["a"], DRAWING, routes=["default"])
    assert bool(image.isfinite().all())


def test_recomputed_activations_give_the_same_step(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    save_images(tmp_path / "images")
    base = opened(pipelines["sd"])
    rows = rows_of(base, tmp_path / "images")
    plain = values(trained(base, rows, tmp_path / "a", epochs=1))
    trainable = trained(base, rows, tmp_path / "b", epochs=1, activation_checkpointing=True)
    assert trainable.model.is_gradient_checkpointing
    again = values(trainable)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)


def test_class_images_are_drawn_once(
    tmp_path: Path, pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(pipelines["sd"])
    unet = base.unet()
    folder = class_images(base, unet, "a field", 3, DRAWING)
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(first) == ["00000.png", "00001.png", "00002.png"]
    assert len(set(first.values())) == 3
    (folder / "00001.png").unlink()
    assert class_images(base, unet, "a field", 3, DRAWING) == folder
    assert (folder / "00001.png").read_bytes() == first["00001.png"]
    assert class_images(base, unet, "a red field", 1, DRAWING) != folder
    monkeypatch.setattr(LatentBase, "drawing", lambda *_: pytest.fail("it was drawn again"))
    assert class_images(base, unet, "a field", 3, DRAWING) == folder


def test_each_image_begins_with_its_prompts_noise(pipelines: dict[str, Path]) -> None:
    base = opened(pipelines["sd"])
    unet = base.unet()
    both = draw(base, unet, ["a", "b"], DRAWING, routes=[None], seed=3)
    [[second]] = draw(base, unet, ["b"], DRAWING, routes=[None], seed=4)
    assert torch.equal(both[1][0], second) and not torch.equal(both[0][0], second)


def test_weights_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path, "sd")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights: conv_in\.weight"):
        opened(tmp_path).unet()


def test_an_adapter_of_other_layers_is_in_force_under_a_route(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    """`draw` uses exactly the route that it is given, whatever is open around it."""
    save_images(tmp_path / "images", 2)
    base = opened(pipelines["sd"])
    trainable = trained(base, rows_of(base, tmp_path / "images"), tmp_path / "run", epochs=2)
    [[plain]] = draw(base, base.unet(), ["a"], DRAWING, routes=[None])
    with use(trainable.model, "default"):
        [[still_plain]] = draw(base, trainable.model, ["a"], DRAWING, routes=[None])
    assert torch.equal(plain, still_plain)


def test_a_prompt_that_is_cut_is_told_once(
    pipelines: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = opened(pipelines["sd"])
    unet = base.unet()
    draw(base, unet, ["word " * 20, "short"], DRAWING, routes=[None, None])
    assert caplog.text.count("the base reads only the first tokens of the prompt") == 1
