"""Frozen lower blocks run once: same outputs, same gradients above them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loralab.errors import ModelError
from loralab.models import (
    blocks,
    build_model,
    enable_activation_checkpointing,
    replaced_prefix,
    run_prefix,
)
from loralab.models.prefix import _tuple_sizes

Build = Callable[..., PreTrainedModel]
Batch = tuple[Tensor, Tensor]
FAMILIES = ["llama", "gpt2", "bert", "roberta", "qwen2", "gemma3_text"]


def backward(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradients of everything that got one."""
    model.zero_grad(set_to_none=True)
    ids, mask = batch
    output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_forward_is_the_plain_forward(
    small: Build, batch: Batch, family: str, num_blocks: int
) -> None:
    model = small(family)
    name, layers = blocks(model)
    expected, gradients = backward(model, batch)
    _tuple_sizes.clear()
    hidden = run_prefix(model, num_blocks, *batch)
    for _ in range(2):
        with replaced_prefix(model, num_blocks, hidden):
            found, above = backward(model, batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for key, gradient in above.items():
            upper = any(key.startswith(f"{name}.{i}.") for i in range(num_blocks, len(layers)))
            if upper or key.startswith(("score", "classifier")):
                torch.testing.assert_close(gradient, gradients[key], rtol=0, atol=1e-6)
            elif any(key.startswith(f"{name}.{i}.") for i in range(num_blocks)):
                assert gradient is None
    again, _ = backward(model, batch)
    assert torch.equal(again, expected)
    assert all("forward" not in vars(block) for block in layers)


def test_the_prefix_is_what_transformers_calls_hidden_states(small: Build, batch: Batch) -> None:
    model = small("llama")
    states = model.base_model(
        input_ids=batch[0], attention_mask=batch[1], output_hidden_states=True
    ).hidden_states
    hidden = run_prefix(model, 2, *batch)
    real = batch[1].bool()
    torch.testing.assert_close(hidden[real], states[2][real])
    assert not hidden.requires_grad


def test_no_dropout_in_the_prefix_and_training_flags_as_before(small: Build, batch: Batch) -> None:
    model = small("bert", dropout=0.5).train()
    model.bert.embeddings.eval()
    flags = [module.training for module in model.modules()]
    first, second = run_prefix(model, 1, *batch), run_prefix(model, 1, *batch)
    assert torch.equal(first, second)
    assert flags == [module.training for module in model.modules()]


def test_only_the_lower_blocks_run(small: Build, batch: Batch) -> None:
    model, calls = small("llama"), []
    for place, block in enumerate(blocks(model)[1]):
        block.register_forward_hook(lambda *_, place=place: calls.append(place))
    run_prefix(model, 2, *batch)
    assert calls == [0, 1]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_activation_checkpointing(small: Build, batch: Batch, family: str) -> None:
    model = small(family, dropout=0.0)
    expected, gradients = backward(model, batch)
    hidden = run_prefix(model, 1, *batch)
    enable_activation_checkpointing(model)
    model.train()
    with replaced_prefix(model, 1, hidden):
        found, above = backward(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    last = f"{blocks(model)[0]}.2."
    for key in (key for key in gradients if key.startswith(last)):
        torch.testing.assert_close(above[key], gradients[key], rtol=0, atol=1e-6)


def test_causal_models_too(small: Build, batch: Batch) -> None:
    model = small("llama", task="causal")
    hidden = run_prefix(model, 2, *batch)
    expected = model(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits
    with replaced_prefix(model, 2, hidden):
        found = model(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_cannot_be_done_is_said(small: Build, batch: Batch) -> None:
    model = small("llama")
    with pytest.raises(ModelError, match=r"prefix of 4 blocks: model\.layers has 3\n.*from 1 to 3"):
        run_prefix(model, 4, *batch)
    hidden = run_prefix(model, 1, *batch)
    with (
        pytest.raises(ModelError, match=r"\(2, 6, 16\) for a batch of shape \(1, 4, 16\)"),
        replaced_prefix(model, 1, hidden),
    ):
        model(input_ids=batch[0][:1, :4])
    t5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
    encoder = build_model({**t5, "vocab_size": 20}, device="cpu").transformer.encoder
    hidden = run_prefix(encoder, 1, torch.tensor([[3, 4]]), torch.ones(1, 2))
    with (
        pytest.raises(ModelError, match="T5Block hand each other more than hidden states"),
        replaced_prefix(encoder, 1, hidden),
    ):
        encoder(input_ids=torch.tensor([[3, 4]]))
