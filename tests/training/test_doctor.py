"""Each illness, and what the doctor says of it."""

from pathlib import Path

import pytest
import torch
from tiny import bert, causal_rows, labelled_rows, llama, of_kind, ready, run
from torch import nn

from loralab.data import Encoded
from loralab.errors import TrainingError
from loralab.training import Examined, Finding, Started, examine, examine_setup

ROWS = labelled_rows(40)


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def warnings(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.level != "info"}


def test_a_healthy_setup_has_no_warning() -> None:
    findings = examine(ready("lora", learning_rate=2e-4, epochs=2), ROWS)
    assert not warnings(findings)
    assert "a gradient reached every trained tensor" in named(findings, "gradients").message
    assert named(findings, "targets").message.startswith("the adapter's modules")
    assert "3 q_proj (576)" in named(findings, "targets").message  # 3 * 4 * (24 + 24)
    assert named(findings, "labels").message == "40 rows, by label: 19 of 0, 21 of 1"


@pytest.mark.parametrize(
    ("kind", "rate", "says"),
    [
        ("lora", 2e-5, "one of full fine-tuning; LoRA's best is about ten times higher"),
        ("full", 1e-3, "one of LoRA; full fine-tuning's best is about ten times lower"),
        ("frozen", 1e-3, "one of LoRA; frozen fine-tuning's"),
    ],
)
def test_rates_that_belong_to_another_method(kind: str, rate: float, says: str) -> None:
    finding = named(examine_setup(ready(kind, learning_rate=rate), ROWS), "learning-rate")
    assert finding.level == "warning"
    assert says in finding.message
    assert finding.next_step.startswith("try ")


def test_a_head_at_the_rate_of_pretrained_weights() -> None:
    assert "head-rate" in warnings(examine_setup(ready("full", learning_rate=2e-5), ROWS))
    mended = ready("full", learning_rate=2e-5, head_learning_rate=1e-3)
    assert "head-rate" not in warnings(examine_setup(mended, ROWS))


def test_a_warmup_that_eats_the_run_or_rounds_to_nothing() -> None:
    long = named(examine_setup(ready("lora", warmup=0.9), ROWS), "warmup")
    assert long.message.startswith("the warm-up takes 9 of 10 steps")
    none = named(examine_setup(ready("lora", warmup=0.04), ROWS), "warmup")
    assert (none.level, none.message[:11]) == ("info", "the warm-up")


def test_labels_that_were_cut_off() -> None:
    blank = [Encoded(r.id, r.group, r.input_ids, None, (-100,) * len(r.input_ids)) for r in ROWS]
    trainable = ready("lora", task="causal")
    some = named(examine_setup(trainable, [*causal_rows(40), *blank[:3]]), "labels")
    assert some.message.endswith("%)")
    findings = examine_setup(trainable, [*causal_rows(40), *blank[:3]])
    assert any(f.message.startswith("3 of 43 rows have no token") for f in findings)
    with pytest.raises(TrainingError, match="40 of 40 rows have no token that counts"):
        run(trainable, blank, [], Path("unused"))


def test_float16_is_warned_of() -> None:
    assert "dtype" in warnings(examine_setup(ready("lora", model=llama(dtype="float16")), ROWS))


def test_an_unused_adapted_module_is_named_by_the_second_step(tmp_path: Path) -> None:
    model = llama()
    model.model.spare = nn.Linear(24, 24)
    events = run(ready("lora", model=model), ROWS, [], tmp_path)
    (examined,) = of_kind(events, Examined)
    (finding,) = examined.findings
    assert (examined.step, finding.level) == (2, "warning")
    assert "model.spare" in finding.message
    assert next(of_kind(events, Started)).findings


def test_a_head_without_gradient_is_an_error(tmp_path: Path) -> None:
    trainable = ready("lora")
    trainable.model.score.adapters.default.weight.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match="no gradient reached the head"):
        run(trainable, ROWS, [], tmp_path)


def test_no_gradient_anywhere_is_an_error(tmp_path: Path) -> None:
    trainable = ready("lora")
    for parameter in trainable.parameters.values():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match="no gradient reached any trained tensor"):
        run(trainable, ROWS, [], tmp_path)


def test_the_first_module_with_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    trainable = ready("lora")
    block = trainable.model.model.layers[1]
    block.mlp.act_fn = Overflow()
    with pytest.raises(
        TrainingError, match=r"output of model\.layers\.1\.mlp\.act_fn \(Overflow\)"
    ):
        run(trainable, ROWS, [], tmp_path)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    trainable = ready("head", model=bert())
    with torch.no_grad():
        trainable.model.bert.encoder.layer[1].output.dense.bias[3] = float("inf")
    with pytest.raises(TrainingError, match=r"the weights bert\.encoder\.layer\.1\.output\.dense"):
        run(trainable, ROWS, [], tmp_path)


class Overflow(nn.Module):
    """0 / 0 where a real module would overflow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")
