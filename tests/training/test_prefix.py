"""A cached frozen prefix changes nothing but the time."""

from pathlib import Path

import pytest
import torch
from tiny import bert, labelled_rows, llama, of_kind, ready, run

from loralab.errors import ConfigError
from loralab.training import StepDone, Validated
from loralab.training.prefix import build_prefix_cache

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


def test_dropout_below_is_refused_and_a_trained_embedding_is_not_cached() -> None:
    with pytest.raises(ConfigError, match=r"the frozen part of the model has dropout \(bert"):
        build_prefix_cache(ready("head", model=bert(), cache_frozen_prefix=True), ROWS)
    with pytest.raises(ConfigError, match="self_attn"):  # a number, no module
        build_prefix_cache(ready("head", model=llama(dropout=0.1), cache_frozen_prefix=True), ROWS)
    embedding = ready("frozen", method={"freeze_embedding": False}, cache_frozen_prefix=True)
    for trainable in (
        embedding,
        ready("full", cache_frozen_prefix=True),
        ready("lora"),
        ready("head"),
    ):
        assert build_prefix_cache(trainable, ROWS) is None
