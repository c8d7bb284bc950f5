"""Compiled models: the route reaches the kernels as a tensor."""

from typing import Any

import pytest
import torch
import torch._dynamo
from peft_oracle import shake
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import build, inputs, logits

import loralab.training  # noqa: F401  which has transformers ask for no padding
from loralab.adapters import LoRAConfig, adapter_parameters, attach, use
from loralab.errors import RouteError

ROUTES: list[Any] = [
    "a",
    "b",
    None,
    ["a", "b", None, "a"],
    ["b"] * 4,
    {"a": 0.5, "b": -1},
    [{"a": 0.5}, None, "b", {"b": 2.0}],
    *({"a": step / 7} for step in range(1, 14)),
]


@pytest.mark.parametrize(
    ("name", "whole"),
    [("llama", "lm_head"), pytest.param("bert", "classifier", marks=pytest.mark.slow)],
)
def test_twenty_routes_compile_once(name: str, whole: str) -> None:
    torch._dynamo.reset()
    model, batch = build(name), inputs(name, 4)
    attach(model, LoRAConfig(rank=4, alpha=8.0, whole_modules=[whole]), "a")
    attach(model, LoRAConfig(rank=2, alpha=8.0), "b")
    for adapter in "ab":
        shake(adapter_parameters(model, adapter).values())
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend)
    assert len(ROUTES) == 20
    with torch.no_grad():
        for route in ROUTES:
            with use(model, route):
                expected = logits(model(**batch))
                # at the largest weights either differs from float64 by 2e-5, at logits of 7
                torch.testing.assert_close(
                    logits(compiled(**batch)), expected, atol=5e-5, rtol=1e-5
                )
    assert backend.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_training_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    model, batch = build("llama").train(), inputs("llama", 3)
    for adapter in "ab":
        attach(model, LoRAConfig(rank=2), adapter)
        shake(adapter_parameters(model, adapter).values(), seed=ord(adapter))
    compiled = torch.compile(model, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        with use(model, ["a", None, "b"]):
            logits(run(**batch)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(RouteError, match="no route"):
        compiled(**batch)
