"""The objective of image training: say what noise was added."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loralab import adapters
from loralab.imaging.denoiser import Denoiser, Images
from loralab.imaging.digits import ImageRow, stack
from loralab.models import evaluating
from loralab.training import Prediction

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

_EVALUATION_TIMESTEPS = 4  # one from each quarter of the schedule
_EVALUATION_ROWS = 64


class Denoising:
    """Mean squared error of a denoiser's prediction, a sum over rows: `training.Objective`.

    class_dropout: the share of rows whose class is hidden, so that one model learns both what
        classifier-free guidance compares (Ho and Salimans 2022, 2207.12598).
    bfloat16: forwards of training run under autocast; parameters and answers stay as they are.
    route: the adapter in use; None leaves the route that is open.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        route: str | None = None,
        class_dropout: float | int = 0.1,
        bfloat16: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self.model: nn.Module = denoiser.unet
        self.route = route
        self.class_dropout = class_dropout
        self.bfloat16 = bfloat16

    def nll_sum(self, rows: Sequence[ImageRow]) -> Float[Tensor, ""]:
        """The sum of the rows' losses; noise, timesteps and hidden classes from torch's default
        generator, drawn on the CPU so that every device sees the same."""
        images = stack(rows)
        noise = torch.randn(images.shape)
        timesteps = torch.randint(self._num_timesteps, (len(rows),))
        labels = torch.tensor([row.label for row in rows])
        hidden = torch.rand(len(rows)) < self.class_dropout
        labels = torch.where(hidden, self.denoiser.none_class, labels)
        with self._routed(), self._precision():
            return self._losses(images, noise, timesteps, labels).sum()

    def answers(self, rows: Sequence[ImageRow]) -> list[Prediction]:
        """Each row's loss at noise and timesteps that its name decides, in evaluation mode."""
        found: list[float] = []
        with evaluating(self.model), torch.no_grad(), self._routed():
            for start in range(0, len(rows), _EVALUATION_ROWS):
                found += self._fixed_losses(rows[start : start + _EVALUATION_ROWS])
        return [
            Prediction(row.id, row.group, row.label, None, loss, 1, 0, None)
            for row, loss in zip(rows, found, strict=True)
        ]

    def _fixed_losses(self, rows: Sequence[ImageRow]) -> list[float]:
        images = stack(rows)
        labels = torch.tensor([row.label for row in rows])
        generators = [_generator(row.id) for row in rows]
        quarter = self._num_timesteps // _EVALUATION_TIMESTEPS
        total = torch.zeros(len(rows))
        for number in range(_EVALUATION_TIMESTEPS):
            noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
            steps = torch.cat([torch.randint(quarter, (1,), generator=g) for g in generators])
            total += self._losses(images, noise, steps + number * quarter, labels).cpu()
        return (total / _EVALUATION_TIMESTEPS).tolist()

    def _losses(
        self,
        images: Images,
        noise: Images,
        timesteps: Int[Tensor, "rows"],
        labels: Int[Tensor, "rows"],
    ) -> Float[Tensor, "rows"]:
        device = self.denoiser.unet.device
        images, noise, timesteps, labels = (
            value.to(device) for value in (images, noise, timesteps, labels)
        )
        scheduler: Any = self.denoiser.scheduler  # whose hints ask for 32-bit timesteps
        noisy = scheduler.add_noise(images, noise, timesteps)
        target = noise
        if scheduler.config["prediction_type"] == "v_prediction":
            target = scheduler.get_velocity(images, noise, timesteps)
        said = self.denoiser.predict(noisy, timesteps, labels)
        return (said.float() - target).square().flatten(1).mean(1)

    @property
    def _num_timesteps(self) -> int:
        return self.denoiser.scheduler.config["num_train_timesteps"]

    def _routed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.route is None else adapters.use(self.model, self.route)

    def _precision(self) -> torch.autocast:
        kind = self.denoiser.unet.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16)


def denoising(
    scheduler: "DDPMScheduler", *, class_dropout: float | int = 0.1, bfloat16: bool = False
) -> Callable[[nn.Module, str | None], "Denoising"]:
    """The `task` of `training.prepare` for a UNet that was, or is, trained with this schedule."""

    def objective(model: nn.Module, route: str | None) -> Denoising:
        denoiser = Denoiser(cast("UNet2DModel", model), scheduler)
        return Denoising(denoiser, route=route, class_dropout=class_dropout, bfloat16=bfloat16)

    return objective


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(f"denoising:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
