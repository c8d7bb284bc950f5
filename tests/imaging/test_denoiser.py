"""The denoiser: its folder, its objective, and images of many adapters in one batch."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from loralab import adapters
from loralab.config import MethodSection, TrainingSection
from loralab.errors import ModelError, RouteError
from loralab.imaging import (
    STYLE_TARGETS,
    Denoiser,
    Denoising,
    DenoisingTask,
    ImageRow,
    build_denoiser,
    load_denoiser,
    load_digits,
    sample_images,
    save_denoiser,
)
from loralab.training import prepare_many
from loralab.training.forward import objective_of
from loralab.training.optimiser import Optimiser
from loralab.training.shared_step import SharedStep, joint_of
from loralab.training.step import Stepper

STEPS = 3


@pytest.fixture(scope="module")
def rows() -> tuple[ImageRow, ...]:
    return load_digits().train[:6]


@pytest.fixture
def denoiser() -> Denoiser:
    return build_denoiser(channels=(16, 32))


def attach_styles(denoiser: Denoiser) -> None:
    """Two adapters with B that is not zero."""
    config = adapters.LoRAConfig(rank=4, alpha=8, targets=STYLE_TARGETS)
    torch.manual_seed(1)
    for name in ("bold", "chalk"):
        adapters.attach(denoiser.unet, config, name=name)
        for parameter in adapters.adapter_parameters(denoiser.unet, name).values():
            torch.nn.init.normal_(parameter, std=0.05)


def test_a_folder_gives_the_denoiser_back(denoiser: Denoiser, tmp_path: Path) -> None:
    save_denoiser(denoiser, tmp_path / "base")
    assert (tmp_path / "base" / "model_index.json").is_file()
    back = load_denoiser(tmp_path / "base")
    before, after = (each.unet.state_dict() for each in (denoiser, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    betas = (each.scheduler.betas for each in (denoiser, back))
    assert torch.equal(*betas)
    assert back.scheduler.config["prediction_type"] == "v_prediction"
    assert (back.image_size, back.fold, back.none_class) == (32, 4, 10)


def test_a_folder_without_parts_says_which(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no unet/config\.json, no scheduler/scheduler_config"):
        load_denoiser(tmp_path)


def test_a_seed_decides_the_weights() -> None:
    one, same, other = (build_denoiser(channels=(16, 32), seed=seed).unet for seed in (0, 0, 1))
    weights = [next(unet.parameters()) for unet in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_folding_loses_nothing(denoiser: Denoiser) -> None:
    """With a UNet that returns its input, a prediction is the image."""
    image = torch.randn(2, 1, 32, 32)
    denoiser.unet.forward = lambda sample, *_, **__: (sample,)  # pyright: ignore
    said = denoiser.predict(image, torch.zeros(2, dtype=torch.long), torch.tensor([1, 2]))
    assert torch.equal(said, image)


def test_answers_are_the_same_every_time(denoiser: Denoiser, rows: tuple[ImageRow, ...]) -> None:
    objective = Denoising(denoiser)
    one = objective.answers(rows)
    torch.manual_seed(5)
    assert objective.answers(rows) == one
    backwards = objective.answers(rows[::-1])[::-1]
    assert [p.nll for p in backwards] == pytest.approx([p.nll for p in one], rel=1e-5)
    assert all(p.num_targets == 1 for p in one)


def test_training_loss_draws_from_the_default_generator(
    denoiser: Denoiser, rows: tuple[ImageRow, ...]
) -> None:
    objective = Denoising(denoiser)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(objective.nll_sum(rows).item())
    assert losses[0] == losses[1] != losses[2]


def test_training_lowers_the_answers_loss(rows: tuple[ImageRow, ...]) -> None:
    denoiser = build_denoiser(channels=(16, 32))
    objective = Denoising(denoiser, class_dropout=0.0)
    before = sum(p.nll for p in objective.answers(rows))
    optimizer = torch.optim.Adam(denoiser.unet.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(25):
        (objective.nll_sum(rows) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(p.nll for p in objective.answers(rows)) < 0.8 * before


def test_an_objective_takes_its_route(denoiser: Denoiser, rows: tuple[ImageRow, ...]) -> None:
    attach_styles(denoiser)
    make = DenoisingTask(denoiser.scheduler)
    with adapters.use(denoiser.unet, "chalk"):
        expected = make(denoiser.unet, None).answers(rows)
    assert make(denoiser.unet, "chalk").answers(rows) == expected
    assert make(denoiser.unet, "bold").answers(rows) != expected


def test_only_the_style_in_use_gets_gradients(
    denoiser: Denoiser, rows: tuple[ImageRow, ...]
) -> None:
    attach_styles(denoiser)
    Denoising(denoiser, route="bold").nll_sum(rows).backward()
    moved = {name for name, p in denoiser.unet.named_parameters() if p.grad is not None}
    assert moved and all(".adapters.bold." in name for name in moved)


def test_styles_in_one_pass_have_the_gradients_that_each_has_alone(
    denoiser: Denoiser, rows: tuple[ImageRow, ...]
) -> None:
    method = MethodSection(rank=4, alpha=8, targets=list(STYLE_TARGETS))
    settings = [(method, TrainingSection(seed=seed)) for seed in range(3)]
    task, names = DenoisingTask(denoiser.scheduler), ["bold", "outline", "chalk"]
    runs = prepare_many(denoiser.unet, settings, task=task, names=names)
    torch.manual_seed(1)
    for parameter in (each for run in runs for each in run.parameters.values()):
        torch.nn.init.normal_(parameter, std=0.05)
    steppers = [
        Stepper(run, Optimiser(run.groups, run.training), objective_of(run)) for run in runs
    ]
    steps = {0: 1, 1: 4, 2: 9}  # noise depends on a run's seed and step alone
    given = {0: rows[:3], 1: rows[3:4], 2: rows[1:6]}

    def taken(losses: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        values = [value for run in runs for value in run.parameters.values()]
        found = [value.grad for value in values]
        for value in values:
            value.grad = None
        return [*losses.values(), *cast(Any, found)]

    assert joint_of(runs) is not None
    together = taken(SharedStep(runs, steppers).gradients(steps, given))
    alone = taken({n: steppers[n].gradients(steps[n], own) for n, own in given.items()})
    least = 1e-6 * max(wanted.norm() for wanted in alone)  # what is zero but for rounding
    for ours, wanted in zip(together, alone, strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm() + least


def test_an_image_does_not_depend_on_its_batch(denoiser: Denoiser) -> None:
    attach_styles(denoiser)
    routes = ["bold", "chalk", None, {"bold": 0.5, "chalk": 0.5}]
    together = sample_images(
        denoiser, [3, 1, 4, 1], seeds=[5, 6, 7, 8], routes=routes, num_steps=STEPS
    )
    for index, route in enumerate(routes):
        alone = sample_images(
            denoiser,
            [[3, 1, 4, 1][index]],
            seeds=[5 + index],
            routes=[route],
            num_steps=STEPS,
        )
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_adapters_change_images(denoiser: Denoiser) -> None:
    attach_styles(denoiser)
    images = sample_images(
        denoiser, [3, 3, 3], seeds=[5, 5, 5], routes=["bold", "chalk", None], num_steps=STEPS
    )
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (images[one] - images[other]).abs().mean() > 1e-3


def test_merged_and_separate_give_the_same_images(denoiser: Denoiser) -> None:
    attach_styles(denoiser)
    merged, _ = adapters.merge(denoiser.unet, "bold")
    separate = sample_images(denoiser, [2, 7], seeds=[1, 2], routes=["bold"] * 2, num_steps=STEPS)
    plain = Denoiser(cast(Any, merged), denoiser.scheduler)
    assert not adapters.hosted(plain.unet)
    images = sample_images(plain, [2, 7], seeds=[1, 2], num_steps=STEPS)
    torch.testing.assert_close(images, separate, atol=1e-4, rtol=1e-4)


def test_without_guidance_the_unet_runs_once_a_step(denoiser: Denoiser) -> None:
    sizes: list[int] = []
    denoiser.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for guidance in (1.0, 2.0):
        sample_images(denoiser, [1, 2], seeds=[0, 1], num_steps=2, guidance=guidance)
    assert sizes == [2, 2, 4, 4]


def test_as_many_seeds_as_labels(denoiser: Denoiser) -> None:
    with pytest.raises(RouteError, match="as many of each: 2 labels, 1 seeds, 3 routes"):
        sample_images(denoiser, [1, 2], seeds=[0], routes=[None] * 3)
