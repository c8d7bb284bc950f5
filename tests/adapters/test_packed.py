"""Packed rows: each segment is what it would be alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft_oracle import shake
from torch import Tensor, nn
from zoo import build, logits

from loralab.adapters import LoRAConfig, adapter_parameters, attach, use
from loralab.errors import RouteError

SIZES = {"a": 4, "b": 2}
ENTRIES: list[Any] = ["a", None, {"a": 0.5, "b": -1.0}, "b"]


def hosting(name: str, **changes: Any) -> nn.Module:
    model = build(name)
    for adapter, rank in SIZES.items():
        attach(model, LoRAConfig(**({"rank": rank, "alpha": 4.0} | changes)), adapter)
        shake(adapter_parameters(model, adapter).values(), seed=rank)
    return model


LLAMA = hosting("llama", targets=["embed_tokens", "q_proj", "down_proj"], whole_modules=["norm"])


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input ids, segment numbers, positions, block-diagonal causal mask) of rows of segments.

    Rows are as long as the longest; what is left over belongs to no segment.
    """
    rows, tokens = len(lengths), max(map(sum, lengths))
    numbers = torch.full((rows, tokens), -1)
    positions = torch.zeros(rows, tokens, dtype=torch.int64)
    next_number = 0
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            numbers[row, start : start + length] = next_number
            positions[row, start : start + length] = torch.arange(length)
            start, next_number = start + length, next_number + 1
    ids = torch.randint(1, 40, (rows, tokens), generator=torch.Generator().manual_seed(2))
    same = numbers[:, :, None] == numbers[:, None, :]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = torch.zeros(rows, 1, tokens, tokens).masked_fill(~(same & causal)[:, None], -1e9)
    return ids, numbers, positions, mask


shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(deadline=None, max_examples=15)
@given(lengths=shapes, entries=st.lists(st.sampled_from(ENTRIES), min_size=9, max_size=9))
def test_each_segment_of_a_transformer_equals_its_solo_run(
    lengths: list[list[int]], entries: list[Any]
) -> None:
    ids, numbers, positions, mask = packed(lengths)
    with use(LLAMA, entries, segments=numbers), torch.no_grad():
        output = logits(LLAMA(input_ids=ids, position_ids=positions, attention_mask=mask))
    for number in range(int(numbers.max()) + 1):
        mine = numbers == number
        with use(LLAMA, entries[number]), torch.no_grad():
            alone = logits(LLAMA(input_ids=ids[mine][None]))[0]
        torch.testing.assert_close(output[mine], alone, atol=1e-5, rtol=1e-5)


class Tokens(nn.Module):
    """A network that treats every token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.table(x))


def test_each_token_of_a_plain_network_equals_its_solo_run_and_gradients_flow() -> None:
    torch.manual_seed(0)
    model = Tokens()
    for name, rank in SIZES.items():
        config = LoRAConfig(
            rank=rank,
            targets=["table", "inner.0", "inner.3"],
            whole_modules=["inner.1"],
            biases="targets",
        )
        attach(model, config, name)
        shake(adapter_parameters(model, name).values(), seed=rank)
    ids, numbers, *_ = packed([[2, 3], [1], [2, 2]])
    with use(model, [*ENTRIES, "a"], segments=numbers):
        output = model(ids)
        output.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values())
    model.zero_grad()
    total = torch.zeros(())
    for number in range(-1, 5):
        mine = numbers == number
        entry = None if number < 0 else [*ENTRIES, "a"][number]
        with use(model, entry):
            alone = model(ids[mine])
        torch.testing.assert_close(output[mine], alone, atol=1e-6, rtol=1e-6)
        total = total + alone.square().sum()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-4, rtol=1e-4)


def test_one_entry_for_all_tokens_asks_nothing_of_the_modules() -> None:
    model = hosting("convnet", targets=["first", "classifier"])
    x = torch.randn(2, 3, 9, 9)
    with use(model, ["a"], segments=torch.zeros(2, 3, dtype=torch.int64)):
        packed_output = model(x)
    with use(model, "a"):
        assert torch.equal(packed_output, model(x))


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("convnet", ["first"], "'first' is a Conv2d, which may look at several tokens"),
        ("perceptron", ["classifier"], r"'classifier' was given \(2, 8\), not 2 rows of 8 tokens"),
    ],
)
def test_modules_that_see_no_tokens_are_named(name: str, targets: list[str], words: str) -> None:
    model = hosting(name, targets=targets)
    x = torch.randn(2, 3, 9, 9) if name == "convnet" else torch.randint(1, 40, (2, 8))
    numbers = torch.zeros(x.shape[:2], dtype=torch.int64)
    numbers[1] = 1
    with use(model, ["a", "b"], segments=numbers), pytest.raises(RouteError, match=words):
        model(x)


def test_a_size_that_is_the_tokens_number_by_chance_is_seen_through() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:  # (rows, tokens, 4) -> (rows, 4 heads, 4)
            return self.heads(x.mT @ x)

    model = Pooled()
    for name in SIZES:
        attach(model, LoRAConfig(rank=1, targets=["heads"]), name)
    numbers = torch.tensor([[0, 0, 1, 1]])
    with use(model, ["a", "b"], segments=numbers), pytest.raises(RouteError, match="'heads'"):
        model(torch.randn(1, 4, 4))


def test_entries_and_numbers_must_agree() -> None:
    numbers = torch.tensor([[0, 1, 2]])
    words = "there are 2 entries, but segments are numbered up to 2"
    with pytest.raises(RouteError, match=words), use(LLAMA, ["a", "b"], segments=numbers):
        pass
    with pytest.raises(RouteError, match="no list"), use(LLAMA, "a", segments=numbers):
        pass
