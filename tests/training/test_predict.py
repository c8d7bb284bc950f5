"""Predictions against one row at a time."""

import math

import pytest
import torch
from tiny import bert, causal_rows, labelled_rows, llama, ready

from loralab.training import accuracy, mean_nll, predict


@pytest.mark.parametrize("build", [llama, bert])
def test_classification_row_by_row(build) -> None:
    model, rows = build().train(), labelled_rows(11)
    found = predict(model, rows, task="classification", batch_size=4)
    assert model.training  # as it was
    model.eval()
    for row, prediction in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        expected = logits.softmax(-1)
        assert (prediction.id, prediction.group, prediction.label) == (row.id, row.group, row.label)
        assert prediction.probabilities == pytest.approx(expected.tolist(), abs=1e-6)
        assert prediction.prediction == int(expected.argmax())
        assert prediction.nll == pytest.approx(-math.log(expected[row.label or 0]), abs=1e-6)
        assert prediction.exact == (prediction.prediction == row.label)
    assert accuracy(found) == sum(p.exact for p in found) / 11
    assert mean_nll(found) == pytest.approx(sum(p.nll for p in found) / 11)


def test_causal_row_by_row() -> None:
    model, rows = llama("causal").eval(), causal_rows(9)
    found = predict(model, rows, task="causal", batch_size=4)
    for row, prediction in zip(rows, found, strict=True):
        assert row.targets is not None
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        log_likelihood, right, count = 0.0, 0, 0
        for place in range(1, len(row.input_ids)):
            if (target := row.targets[place]) != -100:
                log_likelihood += float(logits[place - 1].log_softmax(-1)[target])
                right += int(logits[place - 1].argmax()) == target
                count += 1
        assert prediction.nll == pytest.approx(-log_likelihood, abs=1e-4)
        assert (prediction.num_targets, prediction.num_correct) == (count, right)
    tokens = sum(p.num_targets for p in found)
    assert mean_nll(found) == pytest.approx(sum(p.nll for p in found) / tokens)


def test_order_is_kept_and_bits_do_not_depend_on_it() -> None:
    model, rows = llama(), labelled_rows(12)
    forwards = predict(model, rows, task="classification", batch_size=5)
    backwards = predict(model, rows[::-1], task="classification", batch_size=5)
    assert [p.id for p in backwards] == [row.id for row in rows[::-1]]
    one_by_one = {p.id: p.nll for p in backwards}
    assert [p.nll for p in forwards] == pytest.approx([one_by_one[p.id] for p in forwards])


def test_the_route_decides_which_adapter_speaks() -> None:
    trainable, rows = ready("lora"), labelled_rows(5)
    with torch.no_grad():
        for name, parameter in trainable.parameters.items():
            if name.endswith(".B"):
                parameter.fill_(0.3)
    base = predict(trainable.model, rows, task="classification")
    adapted = predict(trainable.model, rows, task="classification", route=trainable.route)
    assert base != adapted
