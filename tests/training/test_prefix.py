"""A cached frozen prefix changes nothing but the time."""

from pathlib import Path

import pytest
import torch
from tiny import bert, labelled_rows, llama, of_kind, ready, run
from transformers import PreTrainedModel

from loralab.errors import ConfigError
from loralab.training import PrefixStore, StepDone, Validated, fit
from loralab.training.prefix import prefix_cache

ROWS, VALIDATION = labelled_rows(24), labelled_rows(10, seed=1)


@pytest.mark.parametrize("kind", ["frozen", "head"])
@pytest.mark.parametrize("build", [llama, bert])
def test_cached_equals_plain(kind: str, build, tmp_path: Path) -> None:
    def trained(cached: bool):
        model = build(dropout=0.0, pooling="mean")
        trainable = ready(kind, model=model, epochs=2, cache_frozen_prefix=cached)
        return trainable, run(trainable, ROWS, VALIDATION, tmp_path / f"{kind}-{cached}")

    (plain, events), (cached, others) = trained(False), trained(True)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(parameter, cached.parameters[name], rtol=1e-4, atol=1e-5)
    for kind_of_event, value in ((StepDone, "loss"), (Validated, "nll")):
        expected = [getattr(event, value) for event in of_kind(events, kind_of_event)]
        found = [getattr(event, value) for event in of_kind(others, kind_of_event)]
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_frozen_blocks_run_once_a_row(tmp_path: Path) -> None:
    trainable = ready("frozen", epochs=3, cache_frozen_prefix=True)
    rows_seen = []
    trainable.model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda _m, inputs, _o: rows_seen.append(inputs[0].shape[0])
    )
    run(trainable, ROWS, VALIDATION, tmp_path)
    # each row once, and one batch that tells what a block of this class returns
    assert sum(rows_seen) <= len(ROWS) + len(VALIDATION) + trainable.training.batch_size


def test_runs_that_share_a_store_give_the_bits_of_runs_alone(tmp_path: Path) -> None:
    def trained(name: str, seed: int, store: PrefixStore | None):
        trainable = ready("head", model=llama(pooling="mean"), cache_frozen_prefix=True, seed=seed)
        list(fit(trainable, ROWS, VALIDATION, tmp_path / name, prefixes=store))
        return trainable

    store = PrefixStore()
    trained("first", 0, store)
    shared, alone = trained("second", 1, store), trained("alone", 1, None)
    for name, parameter in shared.parameters.items():
        assert torch.equal(parameter, alone.parameters[name])
    assert len(store) == 1
    changed = ready("head", cache_frozen_prefix=True)
    with torch.no_grad():
        changed.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    prefix_cache(changed, [*ROWS, *VALIDATION], store)
    assert len(store) == 2


def refuse(model: PreTrainedModel) -> None:
    prefix_cache(ready("head", model=model, cache_frozen_prefix=True), ROWS, PrefixStore())


def test_dropout_below_is_refused_and_a_trained_embedding_is_not_cached() -> None:
    with pytest.raises(ConfigError, match=r"the frozen part of the model has dropout \(bert"):
        refuse(bert())
    with pytest.raises(ConfigError, match="self_attn"):  # a number, no module
        refuse(llama(dropout=0.1))
    embedding = ready("frozen", method={"freeze_embedding": False}, cache_frozen_prefix=True)
    for trainable in (
        embedding,
        ready("full", cache_frozen_prefix=True),
        ready("lora"),
        ready("head"),
    ):
        assert prefix_cache(trainable, ROWS, PrefixStore()) is None
