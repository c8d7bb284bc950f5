"""LoRA files of whole pipelines, UNet and text encoders, between diffusers, PEFT and loralab."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from loralab.adapters import install, use
from loralab.imaging.formats import read_image_adapter, write_image_adapter

CLASSES: dict[str, Any] = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def opened(folder: Path, kind: str) -> Any:
    return CLASSES[kind].from_pretrained(folder)


def parts_of(pipe: Any, kind: str) -> dict[str, nn.Module]:
    names = ["unet", "text_encoder", *(["text_encoder_2"] if kind == "xl" else [])]
    return {name: getattr(pipe, name) for name in names}


@torch.no_grad()
def answers(pipe: Any, kind: str) -> list[torch.Tensor]:
    """What the UNet and the text encoders say to inputs that are always the same."""
    draw = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    more: dict[str, Any] = {}
    if kind == "xl":
        more["added_cond_kwargs"] = {"text_embeds": random(2, 8), "time_ids": random(2, 6)}
    hidden = random(2, 5, 8 if kind == "sd" else 16)
    said = pipe.encode_prompt(
        "a red cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    texts = [text for text in said if text is not None]
    return [pipe.unet(random(2, 4, 8, 8), 7, hidden, **more).sample, *texts]


def with_peft(pipe: Any, kind: str, targets: list[str]) -> Any:
    for name, part in parts_of(pipe, kind).items():
        wanted = targets if name == "unet" else TEXT
        part.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=wanted))  # type: ignore
        torch.manual_seed(1)
        for parameter_name, parameter in part.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
    return pipe


def save(pipe: Any, kind: str, folder: Path, *, as_scripts_do: bool = False) -> Path:
    """With the settings in the file. as_scripts_do: converted, as diffusers' training scripts do"""
    layers, told = {}, {}
    for name, part in parts_of(pipe, kind).items():
        state = get_peft_model_state_dict(part)
        layers[f"{name}_lora_layers"] = (
            convert_state_dict_to_diffusers(state) if as_scripts_do else state
        )
        config: Any = part.peft_config
        told[f"{name}_lora_adapter_metadata"] = config["default"].to_dict()
    CLASSES[kind].save_lora_weights(folder, **layers, **told)
    return folder / "pytorch_lora_weights.safetensors"


def read_here(file: Path, folder: Path, kind: str) -> tuple[Any, list[torch.Tensor]]:
    pipe = opened(folder, kind)
    model = nn.ModuleDict(parts_of(pipe, kind))
    adapter = read_image_adapter(file, model)
    base = answers(pipe, kind)
    install(model, adapter, "style")
    with use(model, "style"):
        found = answers(pipe, kind)
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(base, found, strict=True))
    return adapter, found


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_pipelines_file_gives_its_outputs_and_ours_gives_them_there(
    tmp_path: Path, pipelines: dict[str, Path], kind: str
) -> None:
    targets = [*ATTENTION, "conv1", "proj_in", "ff.net.0.proj"]
    theirs = with_peft(opened(pipelines[kind], kind), kind, targets)
    expected = answers(theirs, kind)
    adapter, found = read_here(save(theirs, kind, tmp_path / "lora"), pipelines[kind], kind)
    same(found, expected)
    layouts: tuple[Any, ...] = ("diffusers", "kohya")
    for layout in layouts:
        file = tmp_path / f"{layout}.safetensors"
        write_image_adapter(adapter, file, layout)
        same(read_here(file, pipelines[kind], kind)[1], expected)
        back = opened(pipelines[kind], kind)
        back.load_lora_weights(tmp_path, weight_name=file.name)
        same(answers(back, kind), expected)


def test_a_file_of_diffusers_training_scripts_has_two_generations_of_names(
    tmp_path: Path, pipelines: dict[str, Path]
) -> None:
    """They convert attention layers to the names from before PEFT, and leave the others."""
    targets = [*ATTENTION, "conv1"]
    theirs = with_peft(opened(pipelines["xl"], "xl"), "xl", targets)
    file = save(theirs, "xl", tmp_path / "lora", as_scripts_do=True)
    same(read_here(file, pipelines["xl"], "xl")[1], answers(theirs, "xl"))
