"""Blocks under torch.compile: the same training, compiled once, chosen by the clock."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny import bert, labelled_rows, llama, of_kind, ready, run
from torch._dynamo.testing import CompileCounter

from loralab.config import TrainingSection
from loralab.errors import CompileError, ConfigError
from loralab.training import StepDone, Trainable, choose_compile, compiling, fit, repeatable_step
from loralab.training.compiling import choose
from loralab.training.forward import Forward
from loralab.training.optimiser import Optimiser
from loralab.training.step import Stepper

ROWS = labelled_rows(10)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def stepper_of(trainable: Trainable) -> Stepper:
    optimiser = Optimiser(trainable.groups, trainable.training)
    return Stepper(
        trainable, optimiser, Forward(trainable.model, trainable.task, route=trainable.route)
    )


def losses(trainable: Trainable, backend: Any = None, steps: int = 3) -> list[float]:
    stepper = stepper_of(trainable)
    if backend is not None:
        stepper.compile(ROWS, backend)
    return [stepper.step(step, ROWS, 1.0).loss for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lora", {}),
        ("full", {"batch_size": 3, "accumulation": 4}),
        ("full", {"batch_size": 10}),
    ],
)
def test_compiled_blocks_train_alike_and_are_compiled_once(
    kind: str, changes: dict[str, Any]
) -> None:
    """With dropout in the base and in the adapter, and a last piece of one row."""
    model, other, counter = bert(), bert(), CompileCounter()
    method = {"dropout": 0.2}
    plain = ready(kind, model=model, method=method, **changes)
    compiled = ready(kind, model=other, method=method, **changes)
    expected = losses(plain)
    assert losses(compiled, counter) == pytest.approx(expected, rel=1e-6)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(parameter, compiled.parameters[name], rtol=1e-5, atol=1e-6)
    # by whether gradients reach the input (lora: not the first block's) and rows are padded
    assert 0 < counter.frame_count <= (6 if kind == "lora" else 2)
    assert all(module._compiled_call_impl is None for module in other.modules())


def test_masters_of_half_precision_weights_get_the_gradients_of_compiled_blocks() -> None:
    models = [bert(dtype="bfloat16") for _ in range(2)]
    plain, compiled = (ready("full", model=model, learning_rate=1e-4) for model in models)
    assert losses(compiled, CompileCounter()) == pytest.approx(losses(plain), rel=1e-3)


def test_recomputed_blocks_are_not_compiled() -> None:
    """Compiled code run again in the backward pass was seen to draw other masks."""
    assert len(stepper_of(ready("full", activation_checkpointing=True)).regions()) == 0
    with pytest.raises(ConfigError, match="does not go with activation_checkpointing"):
        ready("full", activation_checkpointing=True, compile="on")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_compiler_trains_alike() -> None:
    method = {"dropout": 0.2}
    plain, compiled = (ready("lora", model=bert(), method=method) for _ in range(2))
    assert losses(compiled, "inductor") == pytest.approx(losses(plain), rel=1e-5)


def test_blocks_that_run_fused_are_not_compiled() -> None:
    assert len(stepper_of(ready("lora")).regions()) == 0
    assert len(stepper_of(ready("lora", fuse_blocks=False)).regions()) == 3
    assert len(stepper_of(ready("full")).regions()) == 3
    assert len(stepper_of(ready("lora", model=bert())).regions()) == 2


def test_a_resumed_compiled_run_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with, counter = Stepper.compile, CompileCounter()
    monkeypatch.setattr(Stepper, "compile", lambda own, rows: compile_with(own, rows, counter))
    changes = {"compile": "on", "max_steps": 5, "checkpoint_steps": 2, "epochs": 2}
    straight, broken = tmp_path / "a", tmp_path / "b"
    run(ready("full", model=bert(), **changes), ROWS, ROWS[:3], straight)
    for event in fit(ready("full", model=bert(), **changes), ROWS, ROWS[:3], broken):
        if isinstance(event, StepDone) and event.step == 4:
            break
    again = run(ready("full", model=bert(), **changes), ROWS, ROWS[:3], broken)
    assert [event.step for event in of_kind(again, StepDone)] == [3, 4, 5]
    name = "metrics.jsonl"
    assert (straight / name).read_bytes() == (broken / name).read_bytes()


def test_trying_changes_neither_weights_nor_random_streams() -> None:
    trainable = ready("full", model=bert(), epochs=200)
    before = {name: value.clone() for name, value in trainable.model.state_dict().items()}
    state = torch.get_rng_state()
    compiling_forced = pytest.MonkeyPatch()
    with compiling_forced.context() as patch:
        patch.setattr(compiling, "LIKELY_COMPILE_SECONDS", 0.0)
        choice = choose_compile(trainable, ROWS, backend=CompileCounter())
    assert choice.compile_seconds is not None and choice.compiled_seconds is not None
    assert torch.equal(state, torch.get_rng_state())
    for name, value in trainable.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in trainable.model.parameters())


def test_without_a_compiler_on_is_an_error_and_auto_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_graph: Any, _inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found")

    trainable = ready("full", model=bert(), epochs=200)
    with pytest.raises(CompileError, match=r"BertLayer.*No working C") as error:
        losses(trainable, broken)
    assert "install a C++ compiler" in error.value.next_step
    monkeypatch.setattr(compiling, "LIKELY_COMPILE_SECONDS", 0.0)
    choice = choose_compile(trainable, ROWS, backend=broken)
    assert choice.setting == "off"
    assert "No working C++ compiler" in choice.reason


def test_the_choice_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = [0.0], []
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: now[0])

    def chosen(eager: float, compiled: float, steps: int, regions: int = 2) -> Any:
        tried.clear()

        def run_one(is_compiled: bool) -> None:
            tried.append(is_compiled)
            now[0] += compiled if is_compiled else eager

        def compile_all() -> None:
            now[0] += 40.0

        return choose(run_one, compile_all, num_regions=regions, num_steps=steps, passes_per_step=2)

    assert chosen(1.0, 0.8, 1000).setting == "on"
    assert chosen(1.0, 0.8, 1000).compile_seconds == pytest.approx(40)
    assert chosen(1.0, 1.1, 1000).facts()["compiled_seconds"] == pytest.approx(1.1)
    assert chosen(1.0, 1.1, 1000).setting == "off"
    assert chosen(0.01, 0.001, 1000).reason.startswith("it can save 6 s of this run")
    assert True not in tried
    assert chosen(1.0, 0.5, 150).reason == "150 steps are too few to pay a compilation back"
    assert not tried
    assert chosen(1.0, 0.5, 1000, regions=0).setting == "off"


def test_what_measures_and_plans_steps_compiles_nothing() -> None:
    model = llama()
    trainable = ready("full", model=model, compile="on")
    assert isinstance(trainable.training, TrainingSection)
    repeatable_step(trainable, ROWS)()
    assert not torch._dynamo.utils.counters["stats"]
