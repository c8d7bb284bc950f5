"""The objective of image training: say what noise was added, in one run or in several at once."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loralab import adapters
from loralab.imaging.denoiser import Denoiser, Images
from loralab.imaging.digits import ImageRow, stack
from loralab.imaging.fixed_noise import EVALUATION_TIMESTEPS, generator_of
from loralab.models import evaluating
from loralab.placement import send
from loralab.training import Joint, Prediction, RunStream

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

_EVALUATION_ROWS = 64


@dataclass(frozen=True)
class DenoisingTask:
    """The `task` of `training.prepare` for a UNet that was, or is, trained with this schedule.

    class_dropout, bfloat16: as in `Denoising`.
    """

    scheduler: "DDPMScheduler"
    class_dropout: float | int = 0.1
    bfloat16: bool = False

    def __call__(self, model: nn.Module, route: str | None) -> "Denoising":
        denoiser = Denoiser(cast("UNet2DModel", model), self.scheduler)
        return Denoising(
            denoiser, route=route, class_dropout=self.class_dropout, bfloat16=self.bfloat16
        )

    def joint(self, model: nn.Module) -> Joint:
        """What several runs share: one batch that holds the rows of all."""
        return JointDenoising(self(model, None))


@dataclass(frozen=True)
class Noised:
    """Rows with all that chance decides about them in a step."""

    images: Images
    noise: Images
    timesteps: Int[Tensor, "rows"]
    labels: Int[Tensor, "rows"]


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
        with self._routed(), self.precision():
            return self.losses(self.noised(rows)).sum()

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

    def noised(self, rows: Sequence[ImageRow], random: torch.Generator | None = None) -> Noised:
        """The rows with their noise, timesteps and hidden classes, drawn on the CPU."""
        images = stack(rows)
        noise = torch.randn(images.shape, generator=random)
        timesteps = torch.randint(self._num_timesteps, (len(rows),), generator=random)
        labels = torch.tensor([row.label for row in rows])
        hidden = torch.rand(len(rows), generator=random) < self.class_dropout
        return Noised(
            images, noise, timesteps, torch.where(hidden, self.denoiser.none_class, labels)
        )

    def _fixed_losses(self, rows: Sequence[ImageRow]) -> list[float]:
        images = stack(rows)
        labels = torch.tensor([row.label for row in rows])
        generators = [generator_of(row.id) for row in rows]
        quarter = self._num_timesteps // EVALUATION_TIMESTEPS
        total = torch.zeros(len(rows))
        for number in range(EVALUATION_TIMESTEPS):
            noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
            steps = torch.cat([torch.randint(quarter, (1,), generator=g) for g in generators])
            noised = Noised(images, noise, steps + number * quarter, labels)
            total += self.losses(noised).cpu()
        return (total / EVALUATION_TIMESTEPS).tolist()

    def losses(self, noised: Noised) -> Float[Tensor, "rows"]:
        """Each row's loss, along the route that is open."""
        device = self.denoiser.device
        images, noise = send(noised.images, device), send(noised.noise, device)
        timesteps, labels = send(noised.timesteps, device), send(noised.labels, device)
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

    def precision(self) -> torch.autocast:
        """What forwards of training run under."""
        kind = self.denoiser.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16)


class JointDenoising:
    """Several runs in one forward: `training.Joint`. Each row goes along its run's route."""

    def __init__(self, objective: Denoising) -> None:
        self._objective = objective

    def nll_sums(
        self, rows: Mapping[str, Sequence[ImageRow]], random: Mapping[str, RunStream]
    ) -> dict[str, Float[Tensor, ""]]:
        """The sum of each run's losses, with the noise that it would draw alone."""
        own = [self._objective.noised(rows[name], random[name].cpu) for name in rows]
        counts = [len(each) for each in rows.values()]
        routes = [name for name, each in rows.items() for _ in each]
        together = Noised(
            *(
                torch.cat([getattr(noised, field.name) for noised in own])
                for field in fields(Noised)
            )
        )
        with adapters.use(self._objective.model, routes), self._objective.precision():
            losses = self._objective.losses(together)
        sums = [part.sum() for part in losses.split(counts)]
        return dict(zip(rows, sums, strict=True))
