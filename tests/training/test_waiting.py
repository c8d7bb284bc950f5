"""Nobody waits for the device: a step asks it for nothing."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import bert, causal_rows, labelled_rows, llama, ready, training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from loralab.config import MethodSection
from loralab.data import Encoded, Row
from loralab.imaging import STYLE_TARGETS, Denoising, DenoisingTask, build_denoiser, load_digits
from loralab.models import build_model
from loralab.placement import planned_for, send
from loralab.training import (
    Trainable,
    prepare,
)
from loralab.training.forward import objective_of
from loralab.training.optimiser import Optimiser
from loralab.training.padding import known_padding
from loralab.training.readings import Reading
from loralab.training.shared_step import SharedStep, joint_of
from loralab.training.step import Stepper

aten: Any = torch.ops.aten
ASKING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero}


class Device(TorchDispatchMode):
    """The meta device in the place of a GPU; notes where a host would have waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name is aten.is_pinned:
            return False
        if name is aten._pin_memory:
            return args[0].clone()
        is_here = any(t.is_meta for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
        if name in ASKING and is_here:
            self.waits.append(str(func))
            return 1
        if name is aten._to_copy:
            moves = kwargs.get("device", args[0].device) != args[0].device
            if moves and not kwargs.get("non_blocking"):
                self.waits.append(f"{func} of {tuple(args[0].shape)}")
        return func(*args, **kwargs)


def unread(_reading: Reading, numbers: Tensor) -> None:
    """In the place of `Reading.__init__`: nothing can be copied out of the meta device."""
    assert numbers.is_meta and numbers.shape == (2,)


def on_device(kind: str, task: Any, model: PreTrainedModel, **changes: Any) -> Trainable:
    dtype = changes.pop("dtype", "float32")
    dropout = 0.1 if kind == "lora" else 0.0
    method = MethodSection.model_validate({"kind": kind, "rank": 4, "dropout": dropout})
    model = build_model(model.config, task=task, device="meta", dtype=dtype)
    meta = torch.device("meta")
    return prepare(model, method, training(**changes), task=task, device=meta)


@pytest.mark.parametrize(
    ("kind", "task", "changes"),
    [
        ("lora", "classification", {}),
        ("lora", "classification", {"fuse_blocks": False, "batch_size": 2}),
        ("lora", "causal", {"dtype": "bfloat16", "activation_checkpointing": True}),
        ("full", "classification", {"dtype": "bfloat16"}),
        ("full", "causal", {"max_grad_norm": 0.0}),
        ("frozen", "classification", {}),
    ],
)
def test_a_step_asks_the_device_for_nothing(
    kind: str, task: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = labelled_rows(6) if task == "classification" else causal_rows(6)
    check_asks_nothing(on_device(kind, task, llama(task), **changes), rows, monkeypatch)


def test_a_step_of_an_encoder_asks_the_device_for_nothing(monkeypatch) -> None:
    check_asks_nothing(on_device("lora", "classification", bert()), labelled_rows(6), monkeypatch)


def test_a_step_on_images_asks_the_device_for_nothing(monkeypatch) -> None:
    monkeypatch.setattr(Denoising, "precision", lambda _: nullcontext())  # meta has no autocast
    denoiser, device = build_denoiser(channels=(16, 32)), torch.device("meta")
    method = MethodSection(rank=4, alpha=8.0, targets=list(STYLE_TARGETS))
    task = DenoisingTask(denoiser.scheduler)
    unet: Any = denoiser.unet
    trainable = prepare(unet.to(device), method, training(), task=task, device=device)
    check_asks_nothing(trainable, load_digits().train[:6], monkeypatch)


def check_asks_nothing(
    trainable: Trainable, rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on, with padding and without."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast
    monkeypatch.setattr(Reading, "__init__", unread)
    alike = [rows[0]] * 3
    with planned_for("cuda"), Device() as device:
        stepper = Stepper(
            trainable, Optimiser(trainable.groups, trainable.training), objective_of(trainable)
        )
        for step, own in enumerate((rows, alike, rows, alike), start=1):
            if step == 3:
                assert device.waits  # the first two steps look whom gradients reach
                device.waits.clear()
            stepper.conclude(step, own, stepper.gradients(step, own), 1.0)
    assert device.waits == []


def test_without_a_fused_optimiser_a_step_is_read_before_it_moves(monkeypatch) -> None:
    trainable = on_device("head", "classification", llama(), fused=False)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        check_asks_nothing(trainable, labelled_rows(4), monkeypatch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model", [llama(), bert()], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("lengths", [(5, 3), (4, 4), (1, 1)])
def test_masks_are_what_they_are_where_the_device_is_asked(
    implementation: str, model: PreTrainedModel, lengths: tuple[int, ...]
) -> None:
    model.set_attn_implementation(implementation)
    rows = [Encoded(str(n), str(n), tuple(range(6, 6 + n))) for n in lengths]
    width = max(lengths)
    mask = torch.tensor([[int(at < length) for at in range(width)] for length in lengths])
    ids = torch.arange(6, 6 + mask.numel()).view(mask.shape)
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        wanted = model.eval()(**given).logits
        with known_padding(rows):
            assert torch.equal(model(**given).logits, wanted)


def test_a_pass_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast
    monkeypatch.setattr(Reading, "__init__", unread)
    model, host = build_model(llama().config, device="meta"), torch.device("cpu")
    settings = [(MethodSection(rank=rank, dropout=0.1), training(seed=rank)) for rank in (2, 4)]
    sections = [
        prepare(model, *each, task="classification", device=torch.device("meta"), name=f"run-{n}")
        for n, each in enumerate(settings)
    ]
    runs = [replace(trainable, device=host) for trainable in sections]  # where streams are drawn
    rows = dict(enumerate((labelled_rows(6), labelled_rows(4, seed=1))))
    with planned_for("cuda"), Device() as device:
        steppers = [
            Stepper(own, Optimiser(own.groups, own.training), objective_of(own)) for own in runs
        ]
        shared = SharedStep(runs, steppers)
        assert joint_of(runs) is not None
        for step in (1, 2, 3):
            if step == 3:
                assert device.waits
                device.waits.clear()
            losses = shared.gradients(dict.fromkeys(rows, step), rows)
            for number, stepper in enumerate(steppers):
                stepper.conclude(step, rows[number], losses[number], 1.0)
    assert device.waits == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("task", ["classification", "causal"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_gpu_is_not_waited_for(kind: str, task: str) -> None:
    rows = labelled_rows(6) if task == "classification" else causal_rows(6)
    on_gpu = ready(kind, task=task, method={"dropout": 0.1}, device="cuda")
    optimiser = Optimiser(on_gpu.groups, on_gpu.training)
    stepper = Stepper(on_gpu, optimiser, objective_of(on_gpu))
    for step in (1, 2):
        stepper.step(step, rows, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        enqueued = stepper.conclude(3, rows, stepper.gradients(3, rows), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepper.outcome(enqueued).loss > 0
    host = torch.arange(4.0)
    assert torch.equal(send(host, on_gpu.device).cpu(), host)
    optimiser.close()
