"""The objective of latent training: say what noise was added to an image's latent."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loralab import adapters
from loralab.errors import ModelError
from loralab.imaging.fixed_noise import EVALUATION_TIMESTEPS, generator_of
from loralab.imaging.latent.rows import LatentRow
from loralab.models import evaluating
from loralab.placement import send
from loralab.training import Prediction

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Latents = Float[Tensor, "rows channels height width"]
_EVALUATION_ROWS = 16


@dataclass(frozen=True)
class _Drawn:
    """What is drawn for rows: where in the VAE's distribution, which noise, how much of it."""

    within: Latents
    noise: Latents
    timesteps: Int[Tensor, "rows"]


@dataclass(frozen=True)
class LatentDenoisingTask:
    """The `task` of `training.prepare` for the UNet of a latent diffusion model.

    schedule: of the noise that the base was trained with. scaling, min_snr_gamma, prior_weight: as
    in `LatentDenoising`.
    """

    schedule: "DDPMScheduler"
    scaling: float
    min_snr_gamma: float | int | None = None
    prior_weight: float | int = 1.0

    def __call__(self, model: nn.Module, route: str | None) -> "LatentDenoising":
        return LatentDenoising(
            cast("UNet2DConditionModel", model),
            self.schedule,
            scaling=self.scaling,
            min_snr_gamma=self.min_snr_gamma,
            prior_weight=self.prior_weight,
            route=route,
        )


class LatentDenoising:
    """Mean squared error of a UNet's prediction, a sum over rows: `training.Objective`.

    What is predicted is what the schedule says: noise, velocity (2202.00512) or the latent.

    scaling: what latents are multiplied with (the VAE's `scaling_factor`).
    min_snr_gamma: losses are weighted by min(SNR, gamma) instead of SNR, both seen from the latent
        (Hang et al. 2023, 2303.09556); None weights every timestep alike.
    prior_weight: of the loss on a row's class image, added to that of the row's own.
    route: the adapter in use; None leaves the route that is open.
    """

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        schedule: "DDPMScheduler",
        *,
        scaling: float,
        min_snr_gamma: float | int | None = None,
        prior_weight: float | int = 1.0,
        route: str | None = None,
    ) -> None:
        self.model: nn.Module = unet
        self.unet: Any = unet
        self.schedule: Any = schedule  # whose hints ask for 32-bit timesteps
        self.scaling = scaling
        self.min_snr_gamma = min_snr_gamma
        self.prior_weight = prior_weight
        self.route = route

    def nll_sum(self, rows: Sequence[LatentRow]) -> Float[Tensor, ""]:
        """The sum of the rows' losses. What is drawn comes from torch's default generator, on the
        CPU so that every device sees the same: for the rows first, then for their class images."""
        priors = [row.prior for row in rows if row.prior is not None and self.prior_weight]
        drawn = [self._draw(len(rows), rows[0])]
        if priors:
            drawn.append(self._draw(len(priors), priors[0]))
        with self._routed():
            losses = self._losses([*rows, *priors], _together(drawn))
        own, of_priors = losses[: len(rows)], losses[len(rows) :]
        return own.sum() + self.prior_weight * of_priors.sum()

    def answers(self, rows: Sequence[LatentRow]) -> list[Prediction]:
        """Each row's loss, without its class image's, at noise and timesteps that its name decides:
        one timestep from each quarter of the schedule."""
        found: list[float] = []
        with evaluating(self.model), torch.no_grad(), self._routed():
            for start in range(0, len(rows), _EVALUATION_ROWS):
                found += self._fixed_losses(rows[start : start + _EVALUATION_ROWS])
        return [
            Prediction(row.id, row.group, None, None, loss, 1, 0, None)
            for row, loss in zip(rows, found, strict=True)
        ]

    def _fixed_losses(self, rows: Sequence[LatentRow]) -> list[float]:
        generators = [generator_of(row.id) for row in rows]
        total = torch.zeros(len(rows))
        for quarter in range(EVALUATION_TIMESTEPS):
            each = [self._draw(1, row, g, quarter) for row, g in zip(rows, generators, strict=True)]
            total += self._losses(rows, _together(each)).cpu()
        return (total / EVALUATION_TIMESTEPS).tolist()

    def _draw(
        self,
        count: int,
        like: LatentRow,
        generator: torch.Generator | None = None,
        quarter: int | None = None,
    ) -> _Drawn:
        shape = (count, *like.latent.mean.shape)
        within, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        length = self.schedule.config["num_train_timesteps"]
        if quarter is None:
            return _Drawn(within, noise, torch.randint(length, (count,), generator=generator))
        part = length // EVALUATION_TIMESTEPS
        timesteps = torch.randint(part, (count,), generator=generator) + quarter * part
        return _Drawn(within, noise, timesteps)

    def _losses(self, rows: Sequence[LatentRow], drawn: _Drawn) -> Float[Tensor, "rows"]:
        mean, std = (
            torch.stack([getattr(row.latent, name) for row in rows]) for name in ("mean", "std")
        )
        device = self.unet.device
        latents = send((mean + std * drawn.within) * self.scaling, device)
        noise, timesteps = send(drawn.noise, device), send(drawn.timesteps, device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        said = self.unet(
            noisy.to(self.unet.dtype), timesteps, return_dict=False, **self._conditioning(rows)
        )[0]
        error = (said.float() - self._target(latents, noise, timesteps)).square().flatten(1).mean(1)
        return error * self._weights(timesteps)

    def _target(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, "rows"]) -> Latents:
        match self.schedule.config["prediction_type"]:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.schedule.get_velocity(latents, noise, timesteps)
            case "sample":
                return latents
            case other:
                raise ModelError(
                    f"the schedule predicts {other!r}, which no loss here is for",
                    "choose a base that predicts epsilon, v_prediction or sample.",
                )

    def _weights(self, timesteps: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
        """min(SNR, gamma) seen from the latent, in the unit of what is predicted."""
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        kept = self.schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = kept / (1 - kept)
        if self.schedule.config["prediction_type"] == "epsilon":
            return (self.min_snr_gamma / snr).clamp(max=1)  # also where the SNR is 0
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped if self.schedule.config["prediction_type"] == "sample" else capped / (snr + 1)

    def _conditioning(self, rows: Sequence[LatentRow]) -> dict[str, Any]:
        dtype, device = self.unet.dtype, self.unet.device
        hidden = torch.stack([row.conditioning.hidden for row in rows])
        hidden = send(hidden.to(dtype), device)
        if any(row.conditioning.pooled is None for row in rows):
            return {"encoder_hidden_states": hidden}
        pooled = torch.stack([cast(Tensor, row.conditioning.pooled) for row in rows])
        pooled = send(pooled.to(dtype), device)
        time_ids = send(torch.stack([row.time_ids for row in rows]), device)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    def _routed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.route is None else adapters.use(self.model, self.route)


def _together(drawn: Sequence[_Drawn]) -> _Drawn:
    return _Drawn(
        *(torch.cat([getattr(each, name) for each in drawn]) for name in _Drawn.__annotations__)
    )
