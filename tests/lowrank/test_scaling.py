"""Adam's exact reparametrisation invariance, and the conversions that rest on it."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from loralab.errors import AdapterError
from loralab.lowrank import Setting, alpha_of, equivalent, initial_std, scale_of

DIM, STEPS = 24, 40


def losses(setting: Setting, *, epsilon: float = 0.0, steps: int = STEPS, seed: int = 0):
    """Training a small tanh regression under Adam in fp64; A_0 is one draw times the std."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, inputs = normal(DIM, DIM) / math.sqrt(DIM), normal(64, DIM)
    wanted = torch.tanh(inputs @ (weight + 0.1 * normal(DIM, 3) @ normal(3, DIM)).mT)
    A = (setting.std * normal(setting.rank, DIM)).requires_grad_()
    B = torch.zeros(DIM, setting.rank, dtype=torch.float64, requires_grad=True)
    groups = [
        {"params": [A], "lr": setting.learning_rate_A},
        {"params": [B], "lr": setting.learning_rate_B},
    ]
    optimizer = torch.optim.Adam(groups, eps=epsilon)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = ((torch.tanh(inputs @ (weight + setting.scale * B @ A).mT) - wanted) ** 2).mean()
        loss.backward()
        history.append(loss.item())
        if step == 0 and epsilon == 0:
            A.grad = None  # it is zero, and 0 / 0 is no step
        optimizer.step()
    return history, (setting.scale * B @ A).detach()


BASE = Setting(
    rank=8, alpha=32.0, scaling="alpha/rank", std=0.125, learning_rate_A=1e-3, learning_rate_B=1e-3
)


@pytest.mark.parametrize("epsilon", [0.0, 1e-30])
@pytest.mark.parametrize(("p", "q"), [(2.0, 1.0), (1.0, 4.0), (3.0, 0.5), (0.25, 8.0)])
def test_adam_does_not_see_a_reparametrisation(p, q, epsilon):
    other = Setting(
        rank=8,
        alpha=BASE.alpha / (p * q),
        scaling="alpha/rank",
        std=p * BASE.std,
        learning_rate_A=p * BASE.learning_rate_A,
        learning_rate_B=q * BASE.learning_rate_B,
    )
    expected, expected_delta = losses(BASE, epsilon=epsilon)
    found, found_delta = losses(other, epsilon=epsilon)
    exact = math.log2(p).is_integer() and epsilon == 0  # powers of two move no bit
    assert found == (expected if exact else pytest.approx(expected, rel=1e-9))
    assert torch.allclose(found_delta, expected_delta, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"scaling": "alpha/sqrt(rank)"},
        {"std": 0.5},
        {"alpha": 8.0},
        {"std": 0.03125, "scaling": "alpha/sqrt(rank)", "alpha": 5.0},
    ],
)
def test_a_converted_setting_trains_the_same(change):
    expected, _ = losses(BASE)
    found, _ = losses(equivalent(BASE, **change))
    assert found == pytest.approx(expected, rel=1e-9)


def test_at_another_rank_the_first_update_is_the_same_in_expectation():
    """Means over draws of A_0: their norm is that of the component along the gradient."""

    def mean_first_update(setting: Setting) -> torch.Tensor:
        # one problem, many draws of A_0: the draw is the last thing that the seed decides
        return torch.stack([_first_update(setting, seed) for seed in range(300)]).mean(0)

    low, high = mean_first_update(BASE), mean_first_update(equivalent(BASE, rank=32))
    assert equivalent(BASE, rank=32).alpha == BASE.alpha  # alpha/rank needs no change
    assert float(high.norm() / low.norm()) == pytest.approx(1, abs=0.08)
    root = equivalent(BASE, rank=32, scaling="alpha/sqrt(rank)")
    assert root.alpha == pytest.approx(BASE.alpha / math.sqrt(32))


def _first_update(setting: Setting, seed: int) -> torch.Tensor:
    """Adam's first step: B moves by lr along the sign of its gradient."""
    problem = torch.Generator().manual_seed(0)
    gradient = torch.randn(DIM, 2, generator=problem) @ torch.randn(2, DIM, generator=problem)
    draw = torch.Generator().manual_seed(seed)
    A = setting.std * torch.randn(setting.rank, DIM, generator=draw)
    B = -setting.learning_rate_B * (setting.scale * gradient @ A.mT).sign()
    return setting.scale * B @ A


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 256),
    st.floats(0.5, 512),
    st.sampled_from(["alpha/rank", "alpha/sqrt(rank)"]),
    st.integers(1, 256),
    st.floats(1e-3, 1.0),
)
def test_conversions_keep_both_knobs_and_undo(rank, alpha, scaling, other_rank, std):
    setting = Setting(rank, alpha, "alpha/rank", 0.02, 2e-4, 3e-3)
    other = equivalent(setting, rank=other_rank, scaling=scaling, std=std)
    assert other.first_update == pytest.approx(setting.first_update)
    assert other.steps_before_A_moves == pytest.approx(setting.steps_before_A_moves)
    assert other.learning_rate_B == setting.learning_rate_B
    back = equivalent(other, rank=rank, scaling="alpha/rank", std=0.02)
    assert back.alpha == pytest.approx(alpha)
    assert back.learning_rate_A == pytest.approx(2e-4)


def test_scales_and_effective_step():
    assert scale_of(32, 16) == 2
    assert scale_of(32, 16, "alpha/sqrt(rank)") == 8
    assert alpha_of(8, 16, "alpha/sqrt(rank)") == 32
    std = initial_std("kaiming", 16, 768)
    setting = Setting(16, 32.0, "alpha/rank", std, 1e-3, 1e-3)
    assert setting.effective_step == pytest.approx(2 * 1e-3 / math.sqrt(3 * 768))
    # PEFT's "gaussian" is a hidden learning-rate change: sqrt(3 in) / rank
    gaussian = initial_std("gaussian", 8, 2048) / initial_std("kaiming", 8, 2048)
    assert gaussian == pytest.approx(9.8, rel=0.01)


def test_unknown_scalings_are_named():
    with pytest.raises(AdapterError, match="unknown scaling 'alpha/rnk'"):
        scale_of(1, 1, "alpha/rnk")
