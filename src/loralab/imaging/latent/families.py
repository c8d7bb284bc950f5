"""Which latent diffusion pipelines can be trained, and whether a folder's parts fit together.

Everything is read from configurations: a folder is refused before any weight is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import ModelError, nearest
from loralab.models import PICKLES, pickle_error

INDEX = "model_index.json"
SCHEDULER, SCHEDULER_CONFIG = "scheduler", "scheduler/scheduler_config.json"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_TIME_IDS = 6  # SDXL is told the original size, the crop's corner and the target size

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A pipeline class of diffusers: its parts (folder -> the class it must name)."""

    pipeline: str
    text_encoders: Mapping[str, str]
    tokenizers: tuple[str, ...]

    @property
    def is_xl(self) -> bool:
        """Whether the UNet is told sizes and a pooled embedding besides the text."""
        return len(self.text_encoders) > 1

    @property
    def weights(self) -> dict[str, str]:
        """The parts that have weights."""
        return {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", **self.text_encoders}


FAMILIES = {
    family.pipeline: family
    for family in (
        Family("StableDiffusionPipeline", {"text_encoder": "CLIPTextModel"}, ("tokenizer",)),
        Family(
            "StableDiffusionXLPipeline",
            {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
            ("tokenizer", "tokenizer_2"),
        ),
    )
}


def family_of(folder: Path) -> Family:
    """The family of a diffusers folder. Raises `ModelError` with every part that does not fit."""
    index = index_of(folder)
    if not index:
        raise ModelError(
            f"{folder} is no diffusers pipeline: no {INDEX} in it",
            "give a folder that `pipeline.save_pretrained` wrote, or a hub id.",
        )
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise ModelError(
            f"{folder} is a {name}; trained here are {' and '.join(FAMILIES)}",
            nearest(name, FAMILIES),
        )
    family = FAMILIES[name]
    _refuse_pickles(folder, family)
    faults = [*_part_faults(folder, index, family)]
    faults = faults or _fit_faults(folder, family)
    if faults:
        raise ModelError(
            f"the pipeline in {folder} cannot be trained: {'; '.join(faults)}",
            "copy or download it again, or choose another base.",
        )
    return family


def index_of(folder: Path) -> dict[str, Any]:
    """What a diffusers folder says of itself; empty where it is none."""
    return _read(folder / INDEX) or {}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline of one of the families, whole or not."""
    return index_of(folder).get("_class_name") in FAMILIES


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part that `family_of` found."""
    file = SCHEDULER_CONFIG if part == SCHEDULER else f"{part}/config.json"
    return _read(folder / file) or {}


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a part: one, or its shards; variants (`.fp16.`) are left out."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    shards = sorted((folder / part).glob(f"{stem}-*-of-*.safetensors"))
    single = folder / part / f"{stem}.safetensors"
    return [single] if single.is_file() else shards


def _part_faults(folder: Path, index: Config, family: Family) -> list[str]:
    faults = []
    for part, wanted in family.weights.items():
        named = (index.get(part) or [None, None])[-1]
        if named != wanted:
            faults.append(f"its {part} is a {named}, not a {wanted}")
        elif _read(folder / part / "config.json") is None:
            faults.append(f"{part}/config.json is missing or no JSON")
        elif not weight_files(folder, part):
            faults.append(f"{part}/ has no safetensors file")
    faults += [f"{part}/ is missing" for part in family.tokenizers if not (folder / part).is_dir()]
    if _read(folder / SCHEDULER_CONFIG) is None:
        faults.append(f"{SCHEDULER_CONFIG} is missing or no JSON")
    return faults


def _fit_faults(folder: Path, family: Family) -> list[str]:
    unet, vae = part_config(folder, "unet"), part_config(folder, "vae")
    channels = vae.get("latent_channels", 4)
    faults = [
        f"the UNet's {key} is {found}, latents have {channels} channels"
        for key in ("in_channels", "out_channels")
        if (found := unet.get(key, 4)) != channels
    ]
    if vae.get("latents_mean") or vae.get("shift_factor"):
        faults.append("the VAE shifts its latents (latents_mean, shift_factor)")
    texts = [part_config(folder, part) for part in family.text_encoders]
    width = sum(text.get("hidden_size", 512) for text in texts)
    if (found := unet.get("cross_attention_dim", 1280)) != width:
        faults.append(f"the UNet reads text of width {found}, the text encoders give {width}")
    faults += _added_faults(unet, texts[-1], family)
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        faults.append("the UNet takes classes besides text")
    prediction = part_config(folder, SCHEDULER).get("prediction_type", PREDICTIONS[0])
    if prediction not in PREDICTIONS:
        faults.append(f"its scheduler predicts {prediction!r}; known are {', '.join(PREDICTIONS)}")
    return faults


def _added_faults(unet: Config, text: Config, family: Family) -> list[str]:
    """What the UNet asks for besides text, against what there is."""
    asked = unet.get("addition_embed_type")
    if asked != ("text_time" if family.is_xl else None):
        return [f"its UNet asks for additions of type {asked!r}"]
    if not family.is_xl:
        return []
    given = _TIME_IDS * unet.get("addition_time_embed_dim", 0) + text.get("projection_dim", 512)
    wanted = unet.get("projection_class_embeddings_input_dim")
    return [] if given == wanted else [f"the UNet asks for {wanted} added numbers, not {given}"]


def _refuse_pickles(folder: Path, family: Family) -> None:
    pickles = [
        f"{part}/{file.name}"
        for part in family.weights
        if not weight_files(folder, part)
        for file in sorted((folder / part).glob("*"))
        if file.suffix in PICKLES
    ]
    if pickles:
        raise pickle_error(str(folder), pickles)


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON table; None where there is none that can be read."""
    try:
        table = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None
