"""The same factors, batches and rate give PEFT's loss curve."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import causal_rows, labelled_rows, llama, ready

from loralab.data import collate
from loralab.training import repeatable_step

STEPS = 50


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_fifty_steps_follow_pefts_loss_curve(task: str) -> None:
    rows = labelled_rows(8) if task == "classification" else causal_rows(8)
    rate = 2e-4
    trainable = ready(
        "lora", task=task, learning_rate=rate, warmup=0.0, schedule="constant", weight_decay=0.0,
        method={"rank": 4, "alpha": 8, "dropout": 0.0},
    )  # fmt: skip
    step = repeatable_step(trainable, rows)
    theirs, head = _peft(task, trainable.parameters)
    batch = collate(rows, pad_id=0)
    adamw = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    for _ in range(STEPS):
        loss = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        assert step().loss == pytest.approx(loss.item(), rel=1e-5)
    assert head == (task == "classification")


def _peft(task: str, parameters: dict[str, torch.nn.Parameter]):
    """PEFT on the same base with the same factors, in training mode."""
    head = {"modules_to_save": ["score"]} if task == "classification" else {}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj",
        task_type="SEQ_CLS" if task == "classification" else "CAUSAL_LM", **head,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(llama(task), config).train()
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            module, _, leaf = name.partition(".adapters.default.")
            place = f"base_model.model.{module}."
            place += (
                f"lora_{leaf}.default.weight" if leaf in "AB" else f"modules_to_save.default.{leaf}"
            )
            state[place].copy_(value)
    return theirs, bool(head)
