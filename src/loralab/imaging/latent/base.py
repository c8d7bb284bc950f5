"""A latent diffusion model in a diffusers folder: each part is loaded when it is asked for.

Training needs the VAE and the text encoders once, for what is then kept; only the UNet stays.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import nn

from loralab.errors import ModelError
from loralab.files import replacing, write_json
from loralab.imaging.denoiser import diffusers_library
from loralab.imaging.latent.families import (
    INDEX,
    SCHEDULER,
    Family,
    family_of,
    index_of,
    part_config,
    weight_files,
)
from loralab.models import HUB_ID, hub_folder, quiet

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", SCHEDULER)
_PATTERNS = ("*.json", "*.txt", "model*.safetensors", "diffusion_pytorch_model*.safetensors")
_WANTED = (INDEX, *(f"{part}/{pattern}" for part in _PARTS for pattern in _PATTERNS))
_UNWANTED = ("*.fp16*", "*.non_ema*", "*.ema*", "*/*/*")  # other copies of the same weights

_PIPELINE_UNIT = 8  # diffusers' pipelines draw nothing else, whatever the VAE
_SCALING = 0.18215  # of VAEs whose configuration is older than the key


@dataclass(frozen=True)
class LatentBase:
    """A Stable Diffusion pipeline (1.x, 2.x or XL) that styles are trained on.

    dtype: of the UNet and the text encoders. The VAE is always float32: SDXL's overflows in half
        precision, and its latents are computed once.
    """

    folder: Path
    family: Family
    dtype: torch.dtype
    device: torch.device

    def unet(self) -> "UNet2DConditionModel":
        """The denoiser, frozen, in evaluation mode."""
        return self._model("unet", self.dtype)

    def vae(self) -> "AutoencoderKL":
        """The autoencoder of pixels and latents."""
        return self._model("vae", torch.float32)

    @cached_property
    def schedule(self) -> "DDPMScheduler":
        """The noise that the base was trained with, whatever samples from it."""
        return diffusers_library().DDPMScheduler.from_pretrained(self.folder / SCHEDULER)

    @cached_property
    def sampler(self) -> Any:
        """The class of the scheduler that samples. Raises `ModelError` where diffusers has none."""
        name = str(part_config(self.folder, SCHEDULER).get("_class_name"))
        if name.endswith("Scheduler") and hasattr(diffusers_library(), name):
            return getattr(diffusers_library(), name)
        raise ModelError(
            f"{self.folder / SCHEDULER} names no scheduler of diffusers ({name})",
            "mend `_class_name` in its scheduler_config.json.",
        )

    @property
    def pixels_per_latent(self) -> int:
        """The side of one place of the latents, in pixels."""
        return 2 ** (len(part_config(self.folder, "vae").get("block_out_channels", [0])) - 1)

    @property
    def scaling(self) -> float:
        """What latents are multiplied with before the UNet sees them."""
        return part_config(self.folder, "vae").get("scaling_factor", _SCALING)

    def check_resolution(self, resolution: int) -> None:
        """Raise `ModelError` where images of that side have no whole latents for the UNet."""
        halvings = len(part_config(self.folder, "unet").get("block_out_channels", [0])) - 1
        unit = math.lcm(self.pixels_per_latent * 2**halvings, _PIPELINE_UNIT)
        if resolution % unit:
            raise ModelError(
                f"images of {resolution} x {resolution} pixels do not fit this base: "
                f"it takes multiples of {unit}",
                f"set images.resolution to {max(unit, round(resolution / unit) * unit)}.",
            )

    @contextmanager
    def text_stage(self) -> Iterator[Any]:
        """The pipeline without UNet and VAE, for its `encode_prompt`."""
        with _quiet_diffusers():
            yield self._pipeline(unet=None, vae=None, scheduler=None)
        self.release()

    @contextmanager
    def drawing(self, unet: nn.Module) -> Iterator[Any]:
        """The whole pipeline around a UNet that is loaded already, with the folder's sampler."""
        scheduler = self.sampler.from_pretrained(self.folder / SCHEDULER)
        with _quiet_diffusers():
            yield self._pipeline(unet=unet, vae=self.vae(), scheduler=scheduler)
        self.release()

    def save_with(
        self, unet: nn.Module, folder: Path, documents: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Write the pipeline with another UNet, whole or not at all; the other parts are copied.

        documents: JSON files that lie in it too, by name.
        """
        others = [part for part in _PARTS if part != "unet" and (self.folder / part).is_dir()]
        with replacing(folder) as aside:
            cast(Any, unet).save_pretrained(aside / "unet")
            for part in others:
                shutil.copytree(self.folder / part, aside / part)
            shutil.copy(self.folder / INDEX, aside / INDEX)
            for name, document in documents.items():
                write_json(aside / name, dict(document))

    def hash_of(self, *parts: str) -> str:
        """SHA-256 of the weights and configurations of parts."""
        digest = hashlib.sha256()
        for part in parts:
            for file in [self.folder / part / "config.json", *weight_files(self.folder, part)]:
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()

    def _pipeline(self, **parts: Any) -> Any:
        for part, name in self.family.text_encoders.items():
            parts[part] = self._model(part, self.dtype, getattr(transformers, name))
        for part in self.family.tokenizers:
            parts[part] = self._loaded(part, transformers.CLIPTokenizer.from_pretrained)
        if not self.family.is_xl:
            parts |= {"safety_checker": None, "feature_extractor": None}
            parts["requires_safety_checker"] = False
        else:
            parts["add_watermarker"] = False
            key = "force_zeros_for_empty_prompt"
            parts[key] = index_of(self.folder).get(key, True)
        with quiet():
            pipeline = getattr(diffusers_library(), self.family.pipeline)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _model(self, part: str, dtype: torch.dtype, model_class: Any = None) -> Any:
        model_class = model_class or getattr(diffusers_library(), self.family.weights[part])
        named = "dtype" if part in self.family.text_encoders else "torch_dtype"
        model, info = self._loaded(
            part,
            model_class.from_pretrained,
            **{named: dtype},
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{self.folder / part} lacks weights: {', '.join(missing[:5])}",
                "copy or download it again.",
            )
        return model.to(self.device).eval().requires_grad_(False)

    def _loaded(self, part: str, load: Any, **more: Any) -> Any:
        try:
            with quiet():
                return load(self.folder / part, local_files_only=True, **more)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{self.folder / part} cannot be read: {error}", "copy or download it again."
            ) from error

    def release(self) -> None:
        """Give the memory of parts that are no longer held back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def open_base(name: str, *, dtype: torch.dtype | None = None, device: torch.device) -> LatentBase:
    """The Stable Diffusion pipeline called `name`: a diffusers folder or a hub id.

    dtype: None is the one that its UNet is stored in.

    Only safetensors are read and no code of the folder is run. Raises `ModelError` for a name that
    leads nowhere and for a pipeline that cannot be trained, with everything that does not fit.
    """
    diffusers_library()
    folder = _folder(name)
    base = LatentBase(folder, family_of(folder), dtype or _stored_dtype(folder), device)
    _ = base.sampler  # found missing now, not after the training
    return base


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """What diffusers tells of prompts that are cut is told by who asks, once a prompt."""
    talk = diffusers_library().utils.logging
    verbosity = talk.get_verbosity()
    talk.set_verbosity_error()
    try:
        yield
    finally:
        talk.set_verbosity(verbosity)


def _stored_dtype(folder: Path) -> torch.dtype:
    with safe_open(weight_files(folder, "unet")[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no pipeline folder {name}",
            "give a folder that `pipeline.save_pretrained` wrote, or a hub id such as org/name.",
        )
    advice = "a local folder must exist, a hub id is org/name"
    return hub_folder(name, advice=advice, wanted=_WANTED, unwanted=_UNWANTED)
