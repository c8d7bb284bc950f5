"""Classifiers pool by the attention mask; otherwise they are the plain transformers classes."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from loralab.errors import ModelError
from loralab.models import build_model, load_model

Build = Callable[..., PreTrainedModel]
Batch = tuple[Tensor, Tensor]
DECODERS = ["llama", "gpt2", "qwen2", "gemma3_text"]
ENCODERS = ["bert", "roberta"]


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_takes_the_last_real_token_even_where_it_is_the_padding_id(
    small: Build, batch: Batch, family: str
) -> None:
    model, (ids, mask) = small(family), batch
    alone = torch.cat([logits(model, ids[:1]), logits(model, ids[1:, :4])])
    hidden = model.base_model(input_ids=ids[:1]).last_hidden_state
    torch.testing.assert_close(logits(model, ids, mask), alone)
    torch.testing.assert_close(alone[0], model.get_submodule("score")(hidden[0, -1]))


@pytest.mark.parametrize("pooling", ["native", "mean"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_side_of_the_padding_does_not_matter(
    small: Build, batch: Batch, family: str, pooling: str
) -> None:
    model, (ids, mask) = small(family, pooling=pooling), batch
    left_ids, left_mask = ids.clone(), mask.clone()
    left_ids[1], left_mask[1] = ids[1].roll(2), mask[1].roll(2)
    torch.testing.assert_close(logits(model, left_ids, left_mask), logits(model, ids, mask))


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_encoders_pool_over_real_tokens(
    small: Build, batch: Batch, family: str, pooling: str
) -> None:
    model, (ids, mask) = small(family, pooling=pooling), batch
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[1, :4]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
    head = model.get_submodule("classifier")
    expected = head(pooled) if family == "bert" else head(pooled[None, None])[0]
    torch.testing.assert_close(logits(model, ids, mask)[1], expected)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


@pytest.mark.parametrize("family", ENCODERS)
def test_native_encoders_equal_the_plain_class(
    small: Build, batch: Batch, family: str, tmp_path
) -> None:
    model = small(family)
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(model, type(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(model, *batch), logits(plain, *batch))


def test_decoder_equals_the_plain_class_where_padding_has_an_id_of_its_own(
    small: Build, batch: Batch, tmp_path
) -> None:
    model = small("llama", config={"pad_token_id": 0})
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids, mask = batch
    torch.testing.assert_close(
        logits(model, ids, mask), logits(plain, ids.masked_fill(mask == 0, 0), mask)
    )
    assert isinstance(model, type(plain))
    assert model.config.architectures == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_every_parameter_has_a_gradient_and_the_loss_is_cross_entropy(
    small: Build, batch: Batch, family: str, pooling: str
) -> None:
    model, labels = small(family, pooling=pooling), torch.tensor([0, 1])
    output = model(input_ids=batch[0], attention_mask=batch[1], labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_a_token_that_shares_the_padding_id_is_trained(small: Build) -> None:
    model = small("llama")
    model(input_ids=torch.tensor([[5, 2, 6]]), labels=torch.tensor([1])).loss.backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0


def test_embeddings_in_place_of_ids(small: Build, batch: Batch) -> None:
    model, (ids, mask) = small("llama"), batch
    embedded = model.get_input_embeddings()(ids)
    given = model(inputs_embeds=embedded, attention_mask=mask).logits
    torch.testing.assert_close(given, logits(model, ids, mask))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_have_the_models_dtype_and_a_tuple_on_request(
    small: Build, batch: Batch, dtype: torch.dtype
) -> None:
    model = small("bert", pooling="mean").to(dtype)
    output = model(input_ids=batch[0], attention_mask=batch[1], return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].dtype == dtype


def test_a_copy_is_independent(small: Build, batch: Batch) -> None:
    model = small("llama", pooling="mean", head_bias=True)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, *batch), logits(model, *batch))
    with torch.no_grad():
        twin.get_submodule("score").bias.add_(1.0)
    assert not torch.equal(logits(twin, *batch), logits(model, *batch))
    assert type(twin) is type(model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_peft_wraps_it_head_included(small: Build, batch: Batch, family: str, tmp_path) -> None:
    model = small(family, pooling="mean")
    before = logits(model, *batch)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    torch.testing.assert_close(logits(wrapped, *batch), before)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small(family, pooling="mean"), tmp_path)
    torch.testing.assert_close(logits(again, *batch), logits(wrapped, *batch))


def test_dropouts(small: Build) -> None:
    llama = small("llama", head_dropout=0.3, dropout=0.2)
    assert llama.dropout.p == 0.3
    assert llama.config.attention_dropout == 0.2
    assert llama.model.layers[0].self_attn.attention_dropout == 0.2
    bert = small("bert", dropout=0.0)
    assert {m.p for m in bert.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    kept = small("bert", head_dropout=0.25)
    assert kept.dropout.p == 0.25
    assert kept.bert.embeddings.dropout.p == 0.1
    gpt2 = small("gpt2", dropout=0.0).train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(logits(gpt2, ids), logits(gpt2, ids))
    assert small("roberta", head_dropout=0.3).classifier.dropout.p == 0.3


def test_what_a_saved_model_was_trained_with_comes_back(
    small: Build, batch: Batch, tmp_path
) -> None:
    for family in ("llama", "bert"):
        model = small(family, pooling="mean", head_bias=True)
        with torch.no_grad():
            model.get_submodule(model._head).bias.add_(torch.tensor([0.5, -0.5]))
        model.save_pretrained(tmp_path / family)
        again = load_model(str(tmp_path / family))
        assert again._loralab_fresh_head is None
        assert torch.equal(logits(again, *batch), logits(model, *batch))


def test_a_model_that_pools_in_its_own_way_says_so(small: Build) -> None:
    facts = {"model_type": "distilbert", "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    with pytest.raises(ModelError, match=r"with pre_classifier\n.*pooling = \"native\""):
        build_model({**facts, "vocab_size": 20}, pooling="mean")
    assert build_model({**facts, "vocab_size": 20})._loralab_fresh_head == "classifier"
