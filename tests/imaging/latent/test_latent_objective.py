"""Latent training against a plain training step of diffusers and PEFT, written here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from tiny_pipelines import SIDE, save_images, save_pipeline

from loralab.adapters import adapter_parameters
from loralab.config import MethodSection, TrainingSection
from loralab.errors import DataError
from loralab.imaging.latent import (
    ATTENTION,
    CONVOLUTIONS,
    LatentDenoisingTask,
    LatentRow,
    encode_captions,
    encode_pictures,
    frame,
    latent_rows,
    open_base,
    read_pictures,
    with_prior,
)
from loralab.training import Trainable, prepare

RANK, ALPHA = 3, 6.0
TARGETS = [*ATTENTION, *CONVOLUTIONS]
CPU = torch.device("cpu")


def rows_of(folder: Path, images: Path, prompt: str | None = None) -> tuple[LatentRow, ...]:
    base = open_base(str(folder), dtype=torch.float32, device=CPU)
    pictures = read_pictures(images, prompt=prompt)
    conditioning = encode_captions(base, [p.caption for p in pictures])
    return latent_rows(encode_pictures(base, pictures, SIDE), conditioning, SIDE)


def trainable(folder: Path, **task: Any) -> Trainable:
    base = open_base(str(folder), dtype=torch.float32, device=CPU)
    objective = LatentDenoisingTask(base.schedule, scaling=base.scaling, **task)
    method = MethodSection(rank=RANK, alpha=ALPHA, targets=TARGETS)
    ready = prepare(base.unet(), method, TrainingSection(device="cpu"), task=objective)
    torch.manual_seed(5)
    for name, parameter in ready.parameters.items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return ready


def our_step(ready: Trainable, rows: tuple[LatentRow, ...]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients, by PEFT's names."""
    objective = ready.task(ready.model, ready.route)  # type: ignore[operator]
    torch.manual_seed(0)
    loss = objective.nll_sum(rows) / len(rows)
    loss.backward()
    found = adapter_parameters(ready.model, "default").items()
    return loss.item(), {name: parameter.grad for name, parameter in found}


def their_step(
    kind: str, folder: Path, images: Path, ours: Trainable, gamma: float | None = None
) -> tuple[float, dict[str, Any]]:
    """The step of diffusers' training scripts, with the same adapter and the same chance."""
    classes = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
    pipe: Any = classes[kind].from_pretrained(folder)
    noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    theirs = dict(unet.named_parameters())
    names = {}
    for name, value in adapter_parameters(ours.model, "default").items():
        module, _, letter = name.partition(".adapters.default.")
        names[name] = f"{module}.lora_{letter}.default.weight"
        theirs[names[name]].data.copy_(value.detach().view_as(theirs[names[name]]))
    pictures = read_pictures(images)
    pixels = torch.stack([frame(p.path, SIDE).pixels for p in pictures])
    captions = [p.caption for p in pictures]
    torch.manual_seed(0)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape)  # randn_like follows the layout in memory
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
        ids = pipe.tokenizer(
            captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        ).input_ids
        added = {}
        if kind == "sd":
            hidden = pipe.text_encoder(ids)[0]
        else:
            said = [
                encoder(ids, output_hidden_states=True)
                for encoder in (pipe.text_encoder, pipe.text_encoder_2)
            ]
            hidden = torch.cat([each.hidden_states[-2] for each in said], -1)
            sizes = []
            for number in range(len(pictures)):  # 18 high, shorter side to 16, the middle
                wide = round((20 + 4 * number) * 16 / 18)
                sizes.append([18, 20 + 4 * number, 0, (wide - 16) // 2, 16, 16])
            added["added_cond_kwargs"] = {
                "text_embeds": said[1].text_embeds,
                "time_ids": torch.tensor(sizes, dtype=torch.float32),
            }
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, hidden, **added).sample
    kind_of = noise_scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": latents}.get(kind_of)
    if target is None:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    each = (predicted - target).square().mean((1, 2, 3))
    if gamma is not None:
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        each = each * (weights / (snr if kind_of == "epsilon" else snr + 1))
    each.mean().backward()
    gradients = {name: theirs[other].grad for name, other in names.items()}
    return each.mean().item(), gradients


@pytest.mark.parametrize(
    ("kind", "prediction", "gamma"),
    [
        ("sd", "epsilon", None),
        ("sd", "v_prediction", 5.0),
        ("sd", "sample", None),
        ("xl", "epsilon", 1.0),
    ],
)
def test_loss_and_gradients_are_those_of_a_plain_training_step(
    tmp_path: Path, kind: str, prediction: str, gamma: float | None
) -> None:
    save_pipeline(tmp_path / "base", kind, prediction_type=prediction)
    save_images(tmp_path / "images", 5)
    ours = trainable(tmp_path / "base", min_snr_gamma=gamma)
    loss, gradients = our_step(ours, rows_of(tmp_path / "base", tmp_path / "images"))
    expected, theirs = their_step(kind, tmp_path / "base", tmp_path / "images", ours, gamma)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert len(gradients) > 50
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, theirs[name].view_as(gradient), rtol=1e-4, atol=1e-6, msg=name
        )


def test_the_prior_is_added_with_its_weight(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    """loss(weight) = loss(own) + weight * loss(class): linear, and without at weight 0."""
    save_images(tmp_path / "own", 3)
    save_images(tmp_path / "class", 3, caption=None)
    own = rows_of(pipelines["sd"], tmp_path / "own")
    pairs = with_prior(own, rows_of(pipelines["sd"], tmp_path / "class", "a field"))
    losses, gradients = {}, {}
    for weight in (0.0, 0.5, 1.0, 2.0):
        ready = trainable(pipelines["sd"], prior_weight=weight)
        losses[weight], gradients[weight] = our_step(ready, pairs)
    without, plain = our_step(trainable(pipelines["sd"]), own)
    assert losses[0.0] == without
    assert all(torch.equal(gradients[0.0][name], plain[name]) for name in plain)
    slope = losses[1.0] - losses[0.0]
    assert slope > 0.05
    assert losses[0.5] == pytest.approx(losses[0.0] + 0.5 * slope, rel=1e-5)
    assert losses[2.0] == pytest.approx(losses[0.0] + 2 * slope, rel=1e-5)


def test_pairs_begin_the_shorter_kind_again(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_images(tmp_path / "own", 2)
    save_images(tmp_path / "class", 5, caption="a field")
    own = rows_of(pipelines["sd"], tmp_path / "own")
    priors = rows_of(pipelines["sd"], tmp_path / "class")
    pairs = with_prior(own, priors)
    assert [pair.id for pair in pairs] == [
        "0.png+0.png",
        "1.png+1.png",
        "0.png+2.png",
        "1.png+3.png",
        "0.png+4.png",
    ]
    assert {pair.prior for pair in pairs} == set(priors)
    assert pairs[0].content() != own[0].content()
    with pytest.raises(DataError, match="both kinds: 2 of the instance, 0 of its class"):
        with_prior(own, ())


def test_min_snr_holds_where_the_signal_is_gone(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    """With zero terminal SNR the weight of the last timestep is 1 for noise, 0 for velocity."""
    for prediction, expected in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        schedule = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction)
        task = LatentDenoisingTask(schedule, scaling=1.0, min_snr_gamma=5.0)
        base = open_base(str(pipelines["sd"]), dtype=torch.float32, device=CPU)
        weights = task(base.unet(), None)._weights(torch.tensor([999, 0]))
        assert weights[0].item() == pytest.approx(expected, abs=1e-6)
        assert bool(weights.isfinite().all())


def test_answers_are_the_same_every_time(tmp_path: Path, pipelines: dict[str, Path]) -> None:
    save_images(tmp_path / "own", 4)
    rows = rows_of(pipelines["xl"], tmp_path / "own")
    ready = trainable(pipelines["xl"])
    objective = ready.task(ready.model, ready.route)  # type: ignore[operator]
    first = objective.answers(rows)
    torch.manual_seed(3)
    assert objective.answers(rows) == first
    backwards = objective.answers(rows[::-1])[::-1]
    assert [p.nll for p in backwards] == pytest.approx([p.nll for p in first], rel=1e-5)
