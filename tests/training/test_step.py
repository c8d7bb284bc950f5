"""Accumulation, random streams, activation checkpointing."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import bert, causal_rows, labelled_rows, llama, of_kind, ready, run
from torch.autograd.graph import saved_tensors_hooks

from loralab.errors import ConfigError
from loralab.training import Started, StepDone, offload, repeatable_step
from loralab.training.forward import Forward


@pytest.mark.parametrize("task", ["classification", "causal"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_accumulation_equals_the_big_batch(task: str, kind: str, tmp_path: Path) -> None:
    rows = causal_rows(21) if task == "causal" else labelled_rows(21)
    whole = ready(kind, task=task, batch_size=8, epochs=2, learning_rate=1e-3)
    pieces = ready(kind, task=task, batch_size=2, accumulation=4, epochs=2, learning_rate=1e-3)
    first = list(of_kind(run(whole, rows, [], tmp_path / "a"), StepDone))
    second = list(of_kind(run(pieces, rows, [], tmp_path / "b"), StepDone))
    assert [e.loss for e in first] == pytest.approx([e.loss for e in second], rel=1e-4)
    assert [e.tokens for e in first] == [e.tokens for e in second]
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, pieces.parameters[name], rtol=1e-3, atol=1e-5)


def test_methods_see_the_same_batches_whatever_they_draw(tmp_path: Path) -> None:
    rows, hashes, tokens = labelled_rows(30), set(), set()
    for kind in ("lora", "full", "frozen", "head"):
        events = run(ready(kind, model=bert(), epochs=2), rows, [], tmp_path / kind)
        hashes |= {e.order_hash for e in of_kind(events, Started)}
        tokens |= {tuple(e.tokens for e in of_kind(events, StepDone))}
    assert len(hashes) == len(tokens) == 1
    other = run(ready("head", epochs=2, seed=1), rows, [], tmp_path / "other")
    assert next(of_kind(other, Started)).order_hash not in hashes


def test_dropout_depends_on_seed_and_step_and_leaves_the_global_generator() -> None:
    rows = labelled_rows(4)

    def losses(global_seed: int, **changes: int) -> list[float]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        step = repeatable_step(ready("head", model=bert(), learning_rate=1e-9, **changes), rows)
        found = [step().loss for _ in range(3)]
        assert torch.equal(state, torch.get_rng_state())
        return found

    first = losses(1)
    assert losses(2) == first
    assert len(set(first)) == 3  # other masks at every step
    assert losses(1, seed=5) != first


def test_short_rows_in_half_precision_use_another_attention_with_the_same_result() -> None:
    model = llama(dtype="bfloat16")
    seen = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda m, _: seen.append(m.config._attn_implementation))
    step = repeatable_step(ready("lora", model=model, fuse_blocks=False), labelled_rows(6))
    same = repeatable_step(ready("lora", model=llama(dtype="float32")), labelled_rows(6))
    assert step().loss == pytest.approx(same().loss, rel=0.02)
    assert set(seen) == {"eager"}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_activation_checkpointing_changes_no_bit(kind: str) -> None:
    """With dropout in the adapter and in the base."""
    rows = labelled_rows(6)
    method = {"dropout": 0.2}
    models = [llama(dropout=0.1), llama(dropout=0.1)]
    plain = ready(kind, model=models[0], method=method)
    saving = ready(kind, model=models[1], method=method, activation_checkpointing=True)
    steps = [repeatable_step(trainable, rows) for trainable in (plain, saving)]
    for _ in range(3):
        assert steps[0]() == steps[1]()
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, saving.parameters[name])


def test_offloading_changes_no_gradient_and_moves_no_parameter(monkeypatch) -> None:
    trainable = ready("lora", method={"dropout": 0.2})
    parameters = list(trainable.parameters.values())
    moved: list[torch.Size] = []

    def noting(pack, unpack):
        def noted(tensor):
            host, device = pack(tensor)
            if device is not None:
                moved.append(host.shape)
            return host, device

        return saved_tensors_hooks(noted, unpack)

    monkeypatch.setattr(offload, "WORTH_MOVING_BYTES", 64)
    monkeypatch.setattr(offload, "saved_tensors_hooks", noting)
    found = []
    for context in (nullcontext(), offload.offloaded(trainable.model)):
        torch.manual_seed(0)
        with trainable.routed(), context:
            loss = Forward(trainable.model.train(), "classification").nll_sum(labelled_rows(6))
        found.append(torch.autograd.grad(loss, parameters))
    assert moved
    assert not {p.shape for p in trainable.model.parameters()} & set(moved)
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)


def test_offloading_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="to the host, where they are already"):
        ready("lora", offload_activations=True)
