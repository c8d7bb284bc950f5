"""The optimiser against plain AdamW, and what half precision needs."""

import pytest
import torch
from tiny import labelled_rows, llama, ready

from loralab.training import repeatable_step
from loralab.training.forward import Forward
from loralab.training.optimiser import Optimiser

ROWS = labelled_rows(4)


def test_fp32_steps_are_those_of_plain_adamw() -> None:
    trainable = ready("full", warmup=0.0, weight_decay=0.1, head_learning_rate=1e-2)
    oracle = llama().train()
    decayed = [p for p in oracle.parameters() if p.ndim >= 2]
    others = [p for p in oracle.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        fused=True,
    )
    step = repeatable_step(trainable, ROWS)
    for _ in range(3):
        step()
        (Forward(oracle, "classification")(ROWS).nll_sum() / len(ROWS)).backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    ours = dict(trainable.model.named_parameters())
    for name, expected in oracle.named_parameters():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("masters", [True, False])
def test_small_steps_survive_in_half_precision_only_with_masters(masters: bool) -> None:
    """Steps of 1e-5 on weights of 0.02 and more: below bf16's resolution, above fp32's."""
    trainable = ready(
        "full",
        model=llama(dtype="bfloat16"),
        learning_rate=1e-6,
        warmup=0.0,
        weight_decay=0.0,
        master_weights=masters,
    )
    optimiser = Optimiser(trainable.groups, trainable.training)
    start = {name: value.clone() for name, value in optimiser.trained().items()}
    weight = "model.norm.weight"  # ones: bf16 cannot tell 1 from 1.001
    for _ in range(5):
        for parameter in trainable.parameters.values():
            (parameter * 1.0).sum().backward()
        optimiser.step(1.0, optimiser.grad_norm())
    change = (optimiser.trained()[weight] - start[weight]).abs().max().item()
    assert change == pytest.approx(5e-6, rel=0.1) if masters else change == 0
    kind = torch.float32 if masters else torch.bfloat16
    assert {value.dtype for value in optimiser.trained().values()} == {kind}
    assert {p.dtype for p in trainable.model.parameters()} == {torch.bfloat16}
    optimiser.close()


def test_gradients_accumulate_in_fp32_and_the_model_holds_the_rounded_masters() -> None:
    trainable = ready("full", model=llama(dtype="bfloat16"))
    optimiser = Optimiser(trainable.groups, trainable.training)
    name, parameter = next(iter(trainable.parameters.items()))
    for addend in (1.0, 2**-10):  # their sum is no bf16 number
        (parameter.float() * addend).sum().backward()
    gradient = optimiser.gradients()[name]
    assert gradient is not None
    assert torch.equal(gradient, torch.full_like(gradient, 1 + 2**-10))
    assert parameter.grad is None
    optimiser.step(1.0, optimiser.grad_norm())
    assert torch.equal(parameter, optimiser.trained()[name].bfloat16())
    optimiser.close()
    parameter.float().sum().backward()
    assert parameter.grad is not None  # the hooks are gone


@pytest.mark.parametrize(("max_grad_norm", "left"), [(0.0, 1.0), (1e-3, 1e-3)])
def test_a_largest_norm_of_zero_clips_nothing(max_grad_norm: float, left: float) -> None:
    trainable = ready("head", max_grad_norm=max_grad_norm, learning_rate=1e-3, epsilon=1e30)
    optimiser = Optimiser(trainable.groups, trainable.training)
    (weight,) = trainable.parameters.values()
    start = weight.detach().clone()
    weight.grad = (
        torch.nn.functional.one_hot(torch.tensor(0), weight.numel()).view_as(weight).float()
    )
    optimiser.step(1.0, optimiser.grad_norm())
    first_moment = optimiser.state()["exp_avg/score.weight"].flatten()[0]
    assert first_moment.item() == pytest.approx(0.1 * left, rel=1e-3)
    torch.testing.assert_close(weight, start * (1 - 1e-3 * 0.01))  # such an epsilon stops the step


def test_a_dropped_optimiser_takes_no_more_gradients() -> None:
    trainable = ready("full", model=llama(dtype="bfloat16"))
    first = repeatable_step(trainable, ROWS)
    first()
    del first
    assert repeatable_step(trainable, ROWS)().grad_norm > 0


def test_state_goes_into_the_existing_tensors() -> None:
    source, target = ready("lora"), ready("lora")
    first = Optimiser(source.groups, source.training)
    second = Optimiser(target.groups, target.training)
    for parameter in source.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    first.step(1.0, first.grad_norm())
    places = {name: tensor.data_ptr() for name, tensor in second.trained().items()}
    second.set_trained(first.trained())
    second.set_state(first.state())
    assert {name: tensor.data_ptr() for name, tensor in second.trained().items()} == places
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name])
