"""A key of a LoRA file, taken apart: whose convention it follows, which layer, which tensor."""

import re
from dataclasses import dataclass
from typing import Literal

from loralab.imaging.formats.names import COMPONENTS

Part = Literal["down", "up", "mid", "alpha"]
KOHYA, DIFFUSERS = "kohya-ss", "diffusers"

# ending -> (whose, which tensor); the longest that fits decides
ENDINGS: dict[str, tuple[str, Part]] = {
    ".lora_down.weight": (KOHYA, "down"),
    ".lora_up.weight": (KOHYA, "up"),
    ".lora_mid.weight": (KOHYA, "mid"),
    ".lora_A.weight": (DIFFUSERS, "down"),
    ".lora_B.weight": (DIFFUSERS, "up"),
    ".lora_A.default.weight": (DIFFUSERS, "down"),
    ".lora_B.default.weight": (DIFFUSERS, "up"),
    # before PEFT; diffusers' training scripts still write these for text encoders beside the others
    ".lora_linear_layer.down.weight": (DIFFUSERS, "down"),
    ".lora_linear_layer.up.weight": (DIFFUSERS, "up"),
    ".lora.down.weight": (DIFFUSERS, "down"),
    ".lora.up.weight": (DIFFUSERS, "up"),
    "_lora.down.weight": (DIFFUSERS, "down"),
    "_lora.up.weight": (DIFFUSERS, "up"),
}
# prefixes of kohya-ss -> the parts of a pipeline that they may mean, the first that there is
KOHYA_PARTS = {
    "lora_unet_": ("unet", "transformer"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),  # T5 is Flux' second, SD3's third
}


@dataclass(frozen=True)
class Key:
    """family: "" for alphas of dotted names, which several conventions write alike.

    components: the parts of a pipeline that it may mean; empty where it does not say.
    """

    family: str
    components: tuple[str, ...]
    name: str
    part: Part

    @property
    def underscored(self) -> bool:
        """Whether the name has underscores where the model's has dots."""
        return "." not in self.name and self.family == KOHYA


def parse(key: str) -> Key | None:
    """The key taken apart; None where it follows no convention."""
    family, part, stem = _ending(key)
    if part is None:
        return None
    if stem.startswith("lora_"):
        for prefix, components in KOHYA_PARTS.items():
            if stem.startswith(prefix):
                return Key(KOHYA, components, stem.removeprefix(prefix), part)
        return None
    stem = stem.removeprefix("base_model.model.")
    if stem.startswith("diffusion_model."):  # the original names, as ComfyUI writes them
        return Key(family, KOHYA_PARTS["lora_unet_"], stem.removeprefix("diffusion_model."), part)
    first, _, rest = stem.partition(".")
    if first in COMPONENTS:
        return Key(family, (first,), _modern(rest), part)
    return Key(family, (), _modern(stem), part)


def _ending(key: str) -> tuple[str, Part | None, str]:
    for ending, (family, part) in ENDINGS.items():
        if key.endswith(ending):
            return family, part, key.removesuffix(ending)
    if key.endswith(".alpha"):
        return "", "alpha", key.removesuffix(".alpha")
    return "", None, key


def _modern(name: str) -> str:
    """The name of a layer, where the file has that of its attention's processor."""
    name = name.replace(".processor.", ".").removesuffix(".lora")
    if re.search(r"\.self_attn\.to_(q|k|v|out)$", name):
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return re.sub(r"(\.attn\d?\.to_out)$", r"\1.0", name)
