"""A class-conditional denoiser: diffusers' UNet and scheduler, in a diffusers folder.

Images reach the UNet folded: a patch of pixels becomes channels (pixel unshuffle), as a latent
diffusion's encoder would do, only without loss. A UNet of 16 input channels folds 4 x 4 patches of
a grey image: convolutions run on 8 x 8 places instead of 32 x 32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from loralab.errors import ModelError
from loralab.files import replacing, write_json
from loralab.imaging.digits import IMAGE_SIZE, NUM_DIGITS

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Images = Float[Tensor, "rows channels height width"]
STYLE_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "time_emb_proj"),
)
"""What a style adapter of a UNet adapts: attention, convolutions, the projections of time."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A UNet with the noise schedule it was trained with; grey images in [-1, 1]."""

    unet: "UNet2DModel"
    scheduler: "DDPMScheduler"

    @property
    def device(self) -> torch.device:
        """Where the UNet is. Its own property walks through all modules, at every call."""
        return next(self.unet.parameters()).device

    @property
    def fold(self) -> int:
        """The side of a patch, in pixels, that is one place of the UNet."""
        return math.isqrt(self.unet.config["in_channels"])

    @property
    def image_size(self) -> int:
        """The side of an image in pixels."""
        return self.unet.config["sample_size"] * self.fold

    @property
    def none_class(self) -> int:
        """The class that means "any": what classifier-free guidance moves away from."""
        return self.unet.config["num_class_embeds"] - 1

    def predict(
        self, images: Images, timesteps: Int[Tensor, "rows"], labels: Int[Tensor, "rows"]
    ) -> Images:
        """What the UNet says of noisy images: noise or velocity, as its scheduler's config has it.

        Runs under whatever route is open on `unet`.
        """
        folded = functional.pixel_unshuffle(images, self.fold)
        said = self.unet(folded, timesteps, class_labels=labels, return_dict=False)[0]
        return functional.pixel_shuffle(said, self.fold)


def build_denoiser(
    *,
    channels: tuple[int, ...] = (48, 96),
    fold: int = 4,
    image_size: int = IMAGE_SIZE,
    num_classes: int = NUM_DIGITS,
    seed: int = 0,
) -> Denoiser:
    """A denoiser with random weights that `seed` decides; all levels but the first attend.

    Its schedule is the cosine one (Nichol and Dhariwal 2021, 2102.09672) and it predicts velocity
    (Salimans and Ho 2022, 2202.00512). Raises `ModelError` without diffusers.
    """
    diffusers = diffusers_library()
    later = len(channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=image_size // fold,
            in_channels=fold**2,
            out_channels=fold**2,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * later),
            up_block_types=(*["AttnUpBlock2D"] * later, "UpBlock2D"),
            num_class_embeds=num_classes + 1,
            norm_num_groups=math.gcd(16, *channels),
            attention_head_dim=16,
        )
    schedule = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    return Denoiser(unet, schedule)


def save_denoiser(
    denoiser: Denoiser, folder: Path, documents: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Write a diffusers folder (`model_index.json`, `unet/`, `scheduler/`), whole or not at all.

    documents: JSON files that lie in it too, by name.
    """
    index = {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": diffusers_library().__version__,
        "unet": ["diffusers", type(denoiser.unet).__name__],
        "scheduler": ["diffusers", type(denoiser.scheduler).__name__],
    }
    with replacing(folder) as aside:
        denoiser.unet.save_pretrained(aside / "unet")
        denoiser.scheduler.save_pretrained(aside / "scheduler")
        for name, document in {"model_index.json": index, **(documents or {})}.items():
            write_json(aside / name, dict(document))


def load_denoiser(folder: Path) -> Denoiser:
    """Read such a folder. Raises `ModelError` that names every part that is missing or not fit."""
    diffusers = diffusers_library()
    parts = ("unet/config.json", "scheduler/scheduler_config.json")
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise ModelError(
            f"{folder} is no diffusers folder of a denoiser: no {', no '.join(missing)}",
            "name a folder that holds unet/ and scheduler/.",
        )
    try:
        unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the UNet in {folder} cannot be read: {error}", "copy or train it again."
        ) from error
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    return Denoiser(_checked(unet, folder), scheduler)


def _checked(unet: "UNet2DModel", folder: Path) -> "UNet2DModel":
    config = unet.config
    faults = []
    if not config["num_class_embeds"]:
        faults.append("it takes no class (num_class_embeds is not set)")
    if math.isqrt(config["in_channels"]) ** 2 != config["in_channels"]:
        faults.append(f"{config['in_channels']} input channels are no square patch of grey pixels")
    if config["in_channels"] != config["out_channels"]:
        faults.append("it has other output channels than input channels")
    if faults:
        raise ModelError(
            f"the UNet in {folder} is no class-conditional denoiser: " + "; ".join(faults),
            "name a folder that `save_denoiser` wrote.",
        )
    return unet


def diffusers_library() -> Any:
    """diffusers, imported where it is needed. Raises `ModelError` where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(
            "image models are built with diffusers, which is not installed",
            "install it: pip install 'loralab[images]'.",
        ) from error
    return diffusers
