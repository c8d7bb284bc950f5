"""Who trains, at which rate, and that nothing else moves."""

import pytest
import torch
from tiny import bert, labelled_rows, llama, ready

from loralab.errors import ConfigError, ModelError, TargetError
from loralab.training import Trainable, repeatable_step
from loralab.training.forward import Forward

ROWS = labelled_rows(8)


def moved(trainable: Trainable) -> set[str]:
    """Names of the parameters that two steps changed."""
    before = {name: p.detach().clone() for name, p in trainable.model.named_parameters()}
    step = repeatable_step(trainable, ROWS)
    step(), step()
    after = dict(trainable.model.named_parameters())
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("kind", ["lora", "full", "frozen", "head"])
@pytest.mark.parametrize("build", [llama, bert])
def test_exactly_the_chosen_parameters_move(kind: str, build) -> None:
    trainable = ready(kind, model=build(dropout=0.0, pooling="mean"))
    assert moved(trainable) == set(trainable.parameters)
    for name, parameter in trainable.model.named_parameters():
        assert parameter.requires_grad == (name in trainable.parameters)
        assert parameter.grad is None


def test_frozen_leaves_out_the_lowest_blocks_and_the_embedding_on_request() -> None:
    with_embedding = ready("frozen", method={"frozen_layers": 2, "freeze_embedding": False})
    without = ready("frozen", method={"frozen_layers": 2})
    blocks = {name.split(".")[2] for name in without.parameters if "layers" in name}
    assert blocks == {"2"}
    extra = set(with_embedding.parameters) - set(without.parameters)
    assert extra == {"model.embed_tokens.weight"}
    assert ready("frozen").num_frozen_blocks == 1  # the lower half of three


def test_the_head_has_its_own_rate_and_norms_have_no_decay() -> None:
    trainable = ready("full", learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.1)
    rates = {group.role: group.learning_rate for group in trainable.groups}
    assert rates == {"base": 1e-4, "head": 1e-2}
    for group in trainable.groups:
        decays = {parameter.ndim >= 2 for parameter in group.parameters.values()}
        assert decays == {group.weight_decay == 0.1}


def test_a_fresh_adapter_changes_nothing() -> None:
    plain = Forward(llama().eval(), "classification")(ROWS).logits
    trainable = ready("lora")
    trainable.model.eval()
    adapted = Forward(trainable.model, "classification", route=trainable.route)(ROWS).logits
    assert torch.equal(plain, adapted)


def test_the_adapter_starts_from_the_initialisation_stream_alone() -> None:
    torch.manual_seed(7)
    first = ready("lora").parameters
    torch.manual_seed(8)
    second = ready("lora").parameters
    other = ready("lora", seed=1).parameters
    name = next(name for name in first if name.endswith(".A"))
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_what_a_model_cannot_do_is_said() -> None:
    with pytest.raises(ConfigError, match="needs a classification head"):
        ready("head", task="causal")
    with pytest.raises(ModelError, match="cannot freeze 9 layers"):
        ready("frozen", method={"frozen_layers": 9})
    with pytest.raises(TargetError, match="nowhere"):
        ready("lora", method={"targets": ["q_proj", "nowhere"]})
    with pytest.raises(ConfigError, match="'tpu9' is no device"):
        ready("lora", device="tpu9")
    with pytest.raises(ConfigError, match="is not on this machine"):
        ready("lora", device="cuda:77")
