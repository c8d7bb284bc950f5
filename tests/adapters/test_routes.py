"""Routes: who uses which adapter, in every circumstance a forward may run in."""

import asyncio
import copy
import threading
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings, strategies as st
from peft_oracle import shake
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, SwinConfig, SwinForImageClassification
from zoo import build, inputs, logits

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    carry,
    declare_rows,
    detach,
    hosted,
    use,
)
from loralab.errors import RouteError

SIZES = {"a": 4, "b": 2, "c": 1}


def hosting(name: str = "llama", dropout: float = 0.0, whole: tuple[str, ...] = ()) -> nn.Module:
    """A model with three random adapters of different ranks."""
    model = build(name)
    targets = ["first", "second", "line", "cube"] if name == "convnet" else "all-linear"
    for adapter, rank in SIZES.items():
        config = LoRAConfig(
            rank=rank, alpha=4.0, targets=targets, dropout=dropout, whole_modules=whole
        )
        attach(model, config, adapter)
        shake(adapter_parameters(model, adapter).values(), seed=rank)
    return model


def outputs(model: nn.Module, batch: dict[str, Tensor], route: Any) -> Tensor:
    with use(model, route), torch.no_grad():
        return logits(model(**batch))


LLAMA = hosting("llama", whole=("norm",))
entries = st.one_of(
    st.none(),
    st.sampled_from("abc"),
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([-1.0, 0, 0.3, 1, 2.0]), max_size=3),
)


@settings(deadline=None, max_examples=30)
@given(route=st.lists(entries, min_size=1, max_size=6))
def test_a_row_does_not_depend_on_its_neighbours(route: list[Any]) -> None:
    batch = inputs("llama", len(route))
    mixed = outputs(LLAMA, batch, route)
    for row, entry in enumerate(route):
        alone = outputs(LLAMA, {k: v[row : row + 1] for k, v in batch.items()}, entry)
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "convnet", "perceptron"])
def test_rows_of_any_model(name: str) -> None:
    model = hosting(name, whole=("classifier",) if name != "gpt2" else ("ln_f",))
    route: list[Any] = ["a", None, {"b": 0.5, "c": -1}, "c"]
    batch = inputs(name, 4)
    mixed = outputs(model, batch, route)
    for row, entry in enumerate(route):
        torch.testing.assert_close(
            mixed[row], outputs(model, batch, entry)[row], atol=1e-5, rtol=1e-4
        )


def test_a_broken_neighbour_harms_nobody() -> None:
    model = hosting()
    batch = inputs("llama", 3)
    expected = outputs(model, batch, "a")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "b").values():
            parameter.fill_(float("nan"))
    mixed = outputs(model, batch, ["a", "b", "a"])
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]])
    assert mixed[1].isnan().any()


def test_gradients_reach_every_adapter_of_the_route_and_no_other() -> None:
    model = hosting().train()
    with use(model, ["a", None, {"b": 0.5}]):
        logits(model(**inputs("llama", 3))).square().sum().backward()
    for name in "ab":
        for parameter in adapter_parameters(model, name).values():
            assert parameter.grad is not None and parameter.grad.any()
    assert all(p.grad is None for p in adapter_parameters(model, "c").values())
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)


def test_training_together_gives_each_the_gradient_of_training_alone() -> None:
    model, batch = hosting().train(), inputs("llama", 4)
    route = ["a", "b", "b", "a"]
    with use(model, route):
        logits(model(**batch)).square().sum().backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name in "ab":
        model.zero_grad()
        rows = [row for row, entry in enumerate(route) if entry == name]
        with use(model, name):
            logits(model(input_ids=batch["input_ids"][rows])).square().sum().backward()
        for key, parameter in adapter_parameters(model, name).items():
            assert parameter.grad is not None
            torch.testing.assert_close(together[key], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_under_the_first_route(use_reentrant: bool) -> None:
    model, batch = hosting(dropout=0.2).train(), inputs("llama", 3)
    plain = _two_forwards(model, batch)
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.20
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})  # pyright: ignore
    if use_reentrant:
        model.enable_input_require_grads()  # pyright: ignore
    checkpointed = _two_forwards(model, batch)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-5)


def _two_forwards(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of two forwards under different routes; backward runs under a third."""
    model.zero_grad()
    torch.manual_seed(3)
    with use(model, ["a", "b", None]):
        first = logits(model(**batch)).square().sum()
    with use(model, "b"):
        second = logits(model(**batch)).square().sum()
    with use(model, "c"):
        (first + second).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_of_one_s_own() -> None:
    model = hosting("perceptron").train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        with use(model, ["a", "b"]):
            inner: Any = model.layers
            y = (
                torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
                if checkpointed
                else inner(x)
            )
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(
        (a is None and b is None) or torch.equal(a, b)  # pyright: ignore
        for a, b in zip(*gradients, strict=True)
    )


def test_a_route_belongs_to_its_thread() -> None:
    model, batch = hosting(), inputs("llama")
    base, a = outputs(model, batch, None), outputs(model, batch, "a")
    seen: dict[str, Tensor] = {}

    def run(key: str) -> None:
        with torch.no_grad():
            seen[key] = logits(model(**batch))

    with use(model, "a"):
        threads = [
            threading.Thread(target=run, args=("fresh",)),
            threading.Thread(target=carry(run), args=("given",)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(seen["fresh"], base)
    assert torch.equal(seen["given"], a)


def test_threads_do_not_disturb_each_other() -> None:
    model, batch = hosting(whole=("lm_head",)), inputs("llama")
    expected = {name: outputs(model, batch, name) for name in "abc"}
    wrong: list[str] = []

    def run(name: str) -> None:
        for weight in (1.0, 0.5) * 5:
            result = outputs(model, batch, {name: weight})
            if weight == 1 and not torch.allclose(result, expected[name], atol=1e-6):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tasks_of_one_thread_have_routes_of_their_own() -> None:
    model, batch = hosting(), inputs("llama")
    expected = {name: outputs(model, batch, name) for name in "ab"}

    async def run(name: str) -> bool:
        with use(model, name):
            await asyncio.sleep(0)
            return torch.equal(logits(model(**batch)), expected[name])

    async def both() -> list[bool]:
        return list(await asyncio.gather(run("a"), run("b")))

    assert all(asyncio.run(both()))


def test_a_copy_is_independent() -> None:
    model, batch = hosting(), inputs("llama")
    expected = outputs(model, batch, "a")
    twin = copy.deepcopy(model)
    with use(model, "a"), torch.no_grad():
        assert not torch.allclose(logits(twin(**batch)), expected)
    shake(adapter_parameters(twin, "a").values(), seed=99)
    detach(twin, "b")
    assert torch.equal(outputs(model, batch, "a"), expected)
    assert hosted(model) == ("a", "b", "c") and hosted(twin) == ("a", "c")


def test_training_without_a_route_is_refused() -> None:
    model = hosting().train()
    with pytest.raises(RouteError, match=r"no route[\s\S]*with loralab.use\(model"):
        model(**inputs("llama"))
    with torch.no_grad():
        model(**inputs("llama"))
    with use(model, None):
        model(**inputs("llama"))


def test_faults_of_a_route_come_together() -> None:
    model = hosting()
    with (
        pytest.raises(RouteError, match=r"'aa'.*did you mean 'a'.*not a finite number"),
        use(model, ["aa", {"b": float("nan")}]),
    ):
        pass
    with pytest.raises(RouteError, match="hosts no adapter"), use(build("llama"), "a"):
        pass


def test_a_list_of_another_length_is_refused() -> None:
    model = hosting()
    with use(model, ["a", "b"]), pytest.raises(RouteError, match=r"'model.layers.0.*2 rows"):
        model(**inputs("llama", 3))


def opt() -> tuple[nn.Module, dict[str, Tensor]]:
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(config).eval(), inputs("llama", 4)


def swin() -> tuple[nn.Module, dict[str, Tensor]]:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4
    )
    return SwinForImageClassification(config).eval(), {"pixel_values": torch.randn(4, 3, 16, 16)}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(1, 40, (4, 4))
    return build("t5"), {"input_ids": ids, "decoder_input_ids": ids}


class SequenceFirst(nn.Module):
    """A transformer layer that is given (sequence, rows, features), as torch does by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def sequence_first() -> tuple[nn.Module, dict[str, Tensor]]:
    return SequenceFirst().eval(), {"x": torch.randn(4, 4, 8)}


class Positions(nn.Module):
    """An embedding whose input is positions, not rows."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.places(torch.arange(x.shape[1])))


@pytest.mark.parametrize(
    ("make", "targets", "module"),
    [
        (opt, ["fc1"], "fc1"),
        (swin, ["q_proj", "query"], "attention"),
        (t5, ["relative_attention_bias"], "relative_attention_bias"),
        (sequence_first, ["linear1"], "linear1"),
        (lambda: (Positions(), {"x": torch.randn(4, 4, 8)}), ["places"], "places"),
    ],
)
def test_modules_that_see_no_rows_are_named(make: Any, targets: list[str], module: str) -> None:
    model, batch = make()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoRAConfig(rank=2, targets=[name for name in targets if name in names])
    for adapter in "ab":
        attach(model, config, adapter)
        shake(adapter_parameters(model, adapter).values())
    with torch.no_grad():
        with use(model, ["a", "b", None, "a"]), pytest.raises(RouteError, match=module):
            model(**batch)
        for whole in ("a", ["b"] * 4):
            with use(model, whole):
                model(**batch)


def test_a_declared_dimension_routes_by_row() -> None:
    model, batch = sequence_first()
    for adapter in "ab":
        attach(model, LoRAConfig(rank=2, targets=["linear1", "linear2"]), adapter)
        shake(adapter_parameters(model, adapter).values(), seed=ord(adapter))
    declare_rows(model, {"linear1": 1, "linear2": 1})
    route = ["a", "b", None, "a"]
    mixed = outputs(model, batch, route)
    for row, entry in enumerate(route):
        torch.testing.assert_close(mixed[row], outputs(model, batch, entry)[row])


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention_routes_by_row(batch_first: bool) -> None:
    # In float64: the shaken factors make outputs of 1e4, whose fp32 rounding is above the bound.
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64).eval()
    model = nn.ModuleDict({"attention": attention})
    for adapter in "ab":
        attach(model, LoRAConfig(rank=2, targets=["attention"]), adapter)
        shake(adapter_parameters(model, adapter).values(), seed=ord(adapter))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    x_in = x if batch_first else x.transpose(0, 1)

    def run(route: Any) -> tuple[Tensor, Tensor]:
        with use(model, route), torch.no_grad():
            y, weights = attention(x_in, x_in, x_in, key_padding_mask=mask)
        return (y if batch_first else y.transpose(0, 1)), weights

    mixed, weights = run(["a", "b", None])
    for row, entry in enumerate(["a", "b", None]):
        torch.testing.assert_close(mixed[row], run(entry)[0][row])
        torch.testing.assert_close(weights[row], run(entry)[1][row])
    assert not torch.allclose(run("a")[0], run(None)[0])
