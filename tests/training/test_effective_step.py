"""What Adam sees of a setting, through the real training loop."""

from pathlib import Path

import pytest
import torch
from tiny import labelled_rows, llama, of_kind, ready, run

from loralab.config import MethodSection, TrainingSection
from loralab.lowrank import initial_std
from loralab.training import StepDone, effective_step, examine_setup, prepare

ROWS = labelled_rows(24)
EXACT = {"epsilon": 1e-30, "weight_decay": 0.0, "max_grad_norm": 0.0, "epochs": 3}
RATE = 2.0**-7


def losses(folder: Path, p: float, q: float) -> list[float]:
    """A_0 times p, its rate times p, B's rate times q, the scale over both."""
    trainable = ready(
        "lora",
        method={"alpha": 8.0 / (p * q), "loraplus_lr_ratio": q / p},
        learning_rate=p * RATE,
        head_learning_rate=RATE,
        **EXACT,
    )
    with torch.no_grad():
        for A, _ in trainable.pairs.values():
            A.mul_(p)
    return [event.loss for event in of_kind(run(trainable, ROWS, [], folder), StepDone)]


def test_adam_does_not_see_a_reparametrisation(tmp_path: Path) -> None:
    expected = losses(tmp_path / "base", 1.0, 1.0)
    assert len(expected) == 18 and expected[0] > 1.02 * min(expected)
    for p, q in [(2.0, 1.0), (1.0, 4.0), (0.25, 8.0)]:  # powers of two move no bit
        assert losses(tmp_path / f"{p}-{q}", p, q) == expected
    assert losses(tmp_path / "odd", 3.0, 0.7) == pytest.approx(expected, rel=2e-3)


def test_the_step_is_that_of_the_factors_that_were_drawn() -> None:
    trainable = ready("lora", method={"loraplus_lr_ratio": 4.0}, learning_rate=1e-3)
    found = effective_step(trainable)
    assert found is not None
    assert found.effective_step == pytest.approx(found.scale * found.std_A * 4e-3)
    assert found.steps_before_A_moves == pytest.approx(found.std_A / 1e-3)
    stds = [float(A.detach().std(correction=0)) for A, _ in trainable.pairs.values()]
    assert found.lowest == pytest.approx(2.0 * min(stds) * 4e-3)
    assert found.highest == pytest.approx(2.0 * max(stds) * 4e-3)
    assert found.std_A == pytest.approx(initial_std("kaiming", 4, 24), rel=0.15)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga"])
def test_every_initialisation_has_one(init: str) -> None:
    method = MethodSection(rank=4, alpha=8.0, init=init)
    training = TrainingSection(learning_rate=1e-3, device="cpu", threads=1)
    trainable = prepare(llama(), method, training, task="classification", rows=ROWS)
    found = effective_step(trainable)
    assert found is not None and 0 < found.lowest <= found.effective_step <= found.highest
    assert f"{found.effective_step:.3g}" in " ".join(
        f.message for f in examine_setup(trainable, ROWS)
    )


def test_a_model_without_values_is_prepared_and_has_none() -> None:
    method = MethodSection(rank=4, alpha=8.0, init="eva")
    training = TrainingSection(device="cpu", threads=1)
    meta = torch.device("meta")
    trainable = prepare(llama().to(meta), method, training, task="classification", device=meta)
    assert trainable.pairs
    assert effective_step(trainable) is None


def test_without_an_adapter_there_is_none() -> None:
    assert effective_step(ready("full")) is None
