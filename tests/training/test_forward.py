"""Losses against transformers' own, and the logits that are never made."""

import pytest
import torch
from tiny import VOCABULARY, bert, causal_rows, labelled_rows, llama, ready
from transformers import Gemma2Config, Gemma2ForCausalLM

from loralab.data import Encoded, collate
from loralab.errors import DataError, ModelError
from loralab.fusion import output
from loralab.training.forward import Forward

ROWS = causal_rows(6)


def test_causal_loss_and_gradients_are_those_of_transformers() -> None:
    ours, theirs = llama("causal").train(), llama("causal").train()
    batch = collate(ROWS, pad_id=0)
    count = sum(row.num_targets for row in ROWS)
    loss = Forward(ours, "causal")(ROWS).nll_sum() / count
    expected = theirs(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_a_frozen_output_layer_gives_the_same_loss_without_logits(monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(output, "CHUNK_NUMBERS", chunk)
    plain, frozen = llama("causal").train(), llama("causal").train()
    frozen.lm_head.weight.requires_grad_(False)  # tied: the embedding's, too
    made = []
    frozen.lm_head.register_forward_hook(lambda *_: made.append(1))
    forward = Forward(frozen, "causal")
    loss = forward.nll_sum(ROWS)
    assert len(made) == 1  # in the trial of a few tokens
    expected = Forward(plain, "causal")(ROWS).nll_sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, other in zip(frozen.parameters(), plain.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad)


def test_an_output_layer_whose_logits_are_changed_afterwards_makes_them() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    config = Gemma2Config(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        final_logit_softcapping=0.1,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).requires_grad_(False).eval()
    forward = Forward(model, "causal")
    torch.testing.assert_close(forward.nll_sum(ROWS), forward(ROWS).nll_sum())


def test_the_output_layer_sees_only_positions_with_a_label() -> None:
    model = llama("causal").eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape)))
    Forward(model, "causal")(ROWS)
    assert seen == [(sum(row.num_targets for row in ROWS), VOCABULARY)]


def test_an_adapter_on_the_output_layer_is_used_on_gathered_positions() -> None:
    trainable = ready("lora", task="causal", method={"targets": ["lm_head", "q_proj"]})
    with torch.no_grad():
        trainable.parameters["lm_head.adapters.default.B"].fill_(0.1)
    trainable.model.eval()
    plain = Forward(trainable.model, "causal")(ROWS).logits
    adapted = Forward(trainable.model, "causal", route=trainable.route)(ROWS).logits
    assert not torch.allclose(plain, adapted)


@pytest.mark.parametrize("build", [llama, bert])
def test_classification_loss_is_that_of_transformers(build) -> None:
    rows = labelled_rows(6)
    model = build().eval()
    batch = collate(rows, pad_id=0)
    expected = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    torch.testing.assert_close(Forward(model, "classification")(rows).nll().mean(), expected)


def test_what_has_no_loss_is_refused() -> None:
    bare = Encoded(id="r1", group="r1", input_ids=(3, 4))
    with pytest.raises(DataError, match="rows without a label: r1"):
        Forward(llama(), "classification")([bare])
    with pytest.raises(ModelError, match="no output layer"):
        Forward(llama(), "causal")(ROWS)
