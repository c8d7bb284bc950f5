"""Checks that find a worthless run before it is paid for: at the setup and after two steps."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from loralab.data import Row
from loralab.errors import TrainingError
from loralab.training.effective_step import effective_step
from loralab.training.events import Finding
from loralab.training.forward import objective_of
from loralab.training.methods import ADAPTER_NAME, Trainable
from loralab.training.optimiser import Optimiser
from loralab.training.plan import lay_out
from loralab.training.schedule import build_schedule
from loralab.training.step import Stepper

LOWEST_LORA_RATE = 5e-5
"""Best LoRA rates lie between 5e-5 and 5e-4 where both were swept (Biderman et al. 2024,
2405.09353), about 9.8 times those of full fine-tuning (Schulman 2025, "LoRA Without Regret")."""

HIGHEST_FULL_RATE = 3e-4
"""Calibrated LoRA rates begin here; those of full fine-tuning are a tenth (tinker-cookbook)."""

LOWEST_HEAD_RATE = 1e-4
"""A randomly initialised head at a full fine-tuning rate of 2e-5 barely leaves its start."""


def examine(trainable: Trainable, rows: Sequence[Row]) -> list[Finding]:
    """Everything that can be known of a run by its second step, which is done here on `rows`.

    Changes the trained weights. Raises `TrainingError` for a loss that is not a number.
    """
    findings = examine_setup(trainable, rows)
    if any(finding.level == "error" for finding in findings):
        return findings
    plan = lay_out(rows, trainable.training)
    schedule = build_schedule(trainable.training, plan.total_steps)
    optimiser = Optimiser(trainable.groups, trainable.training)
    try:
        stepper = Stepper(trainable, optimiser, objective_of(trainable))
        batches = plan.batches(1)
        for step in (1, 2):
            batch = [rows[index] for index in batches[(step - 1) % len(batches)]]
            outcome = stepper.step(step, batch, schedule.factor(min(step, plan.total_steps)))
            text = f"step {step}: loss {outcome.loss:.4f}, gradient norm {outcome.grad_norm:.3g}"
            findings.append(Finding("info", "step", text))
    finally:
        optimiser.close()
    return findings + examine_gradients(trainable, stepper.without_gradient())


def examine_setup(trainable: Trainable, rows: Sequence[Row]) -> list[Finding]:
    """What settings, model and rows tell before the first step."""
    return [
        *_parameters(trainable),
        *_effective_step(trainable),
        *_head(trainable),
        *_labels(trainable, rows),
        *_warmup(trainable, rows),
        *_rates(trainable),
        *_dtype(trainable),
    ]


def examine_gradients(trainable: Trainable, without: Collection[str]) -> list[Finding]:
    """What the first two steps tell: which trained tensors no gradient has reached."""
    if not without:
        return [Finding("info", "gradients", "a gradient reached every trained tensor")]
    modules = sorted({name.rpartition(".")[0] or name for name in without})
    if len(without) == len(trainable.parameters):
        return [
            Finding(
                "error",
                "gradients",
                "no gradient reached any trained tensor in two steps",
                "check that the rows have labels and that the forward uses the adapted modules.",
            )
        ]
    head = [m for m in modules if trainable.head and f"{m}.".startswith(f"{trainable.head}.")]
    if head:
        return [
            Finding(
                "error",
                "gradients",
                f"no gradient reached the head ({', '.join(head)}) in two steps",
                "check that the labels differ and that the model uses this head.",
            )
        ]
    return [
        Finding(
            "warning",
            "gradients",
            f"no gradient reached {_listed(modules)} in two steps: the model does not use them, "
            "so they are paid for and not trained",
            "leave them out with method.exclude (LoRA), or go on if that is meant.",
        )
    ]


def check(findings: Iterable[Finding]) -> None:
    """Raise `TrainingError` with all findings of level "error"."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        raise TrainingError(
            "; ".join(finding.message for finding in errors),
            " ".join(finding.next_step for finding in errors),
        )


def _parameters(trainable: Trainable) -> Iterator[Finding]:
    total = trainable.num_total
    share = 100 * trainable.num_trainable / max(1, total)
    text = f"{trainable.num_trainable:,} of {total:,} parameters train ({share:.3g} %)"
    yield Finding("info", "parameters", text)
    if trainable.route is None:
        return
    marker = f".adapters.{ADAPTER_NAME}."
    cost: dict[str, set[str]] = defaultdict(set)
    numbers: Counter[str] = Counter()
    for name, parameter in trainable.parameters.items():
        if marker in name and name.rpartition(".")[2] in ("A", "B"):
            module = name.partition(marker)[0]
            kind = _kind(module)
            cost[kind].add(module)
            numbers[kind] += parameter.numel()
    listed = ", ".join(f"{len(cost[k])} {k} ({n:,})" for k, n in numbers.most_common())
    yield Finding("info", "targets", f"the adapter's modules and their parameters: {listed}")


def _kind(module: str) -> str:
    """The last part of its name that is no number, with what follows: `to_out.0`."""
    found = re.search(r"[^.]*[^.\d][^.]*[.\d]*$", module)
    return found[0] if found else module


def _effective_step(trainable: Trainable) -> Iterator[Finding]:
    found = effective_step(trainable)
    if found is not None:
        yield Finding("info", "effective-step", found.describe())


def _head(trainable: Trainable) -> Iterator[Finding]:
    if trainable.head is None:
        return
    groups = [group for group in trainable.groups if group.role == "head"]
    if not groups:
        yield Finding(
            "error",
            "head",
            f"the head {trainable.head!r} is not trained, and it was initialised at random",
            f"add {trainable.head!r} to method.whole_modules.",
        )
        return
    numbers = sum(p.numel() for group in groups for p in group.parameters.values())
    rate = groups[0].learning_rate
    text = f"the head {trainable.head!r} trains {numbers:,} parameters at rate {rate:g}"
    yield Finding("info", "head", text)
    if rate < LOWEST_HEAD_RATE:
        yield Finding(
            "warning",
            "head-rate",
            f"the head starts at random and its rate {rate:g} is one for pretrained weights",
            "set training.head_learning_rate to 1e-3 or so.",
        )


def _labels(trainable: Trainable, rows: Sequence[Row]) -> Iterator[Finding]:
    if callable(trainable.task):
        yield Finding("info", "rows", f"{len(rows):,} rows")
        return
    if trainable.task == "classification":
        counts = sorted(Counter(row.label for row in rows).items(), key=str)
        listed = ", ".join(f"{count:,} of {label}" for label, count in counts)
        yield Finding("info", "labels", f"{len(rows):,} rows, by label: {listed}")
        return
    counting = [row.num_targets for row in rows]
    tokens = sum(row.num_tokens for row in rows)
    empty = counting.count(0)
    share = 100 * sum(counting) / max(1, tokens)
    text = f"{sum(counting):,} of {tokens:,} tokens count in the loss ({share:.3g} %)"
    yield Finding("info", "labels", text)
    if empty:
        yield Finding(
            "error" if empty == len(rows) else "warning",
            "labels",
            f"{empty:,} of {len(rows):,} rows have no token that counts: the completion was cut "
            "off or is empty",
            "raise data.max_tokens, or shorten the prompts.",
        )


def _warmup(trainable: Trainable, rows: Sequence[Row]) -> Iterator[Finding]:
    total = lay_out(rows, trainable.training).total_steps
    warmup = build_schedule(trainable.training, total).warmup_steps
    if trainable.training.warmup and not warmup:
        text = f"the warm-up is less than half of one of {total} steps, so there is none"
        yield Finding("info", "warmup", text)
    elif warmup * 2 >= total and warmup > 1:
        yield Finding(
            "warning",
            "warmup",
            f"the warm-up takes {warmup} of {total} steps: the mean rate stays far below "
            "training.learning_rate",
            "set training.warmup to 0.1 or less.",
        )


def _rates(trainable: Trainable) -> Iterator[Finding]:
    rate, kind = trainable.training.learning_rate, trainable.method.kind
    if kind == "lora" and rate < LOWEST_LORA_RATE:
        yield Finding(
            "warning",
            "learning-rate",
            f"training.learning_rate {rate:g} is one of full fine-tuning; LoRA's best is about "
            "ten times higher",
            f"try {10 * rate:g}.",
        )
    elif kind in ("full", "frozen") and rate > HIGHEST_FULL_RATE:
        yield Finding(
            "warning",
            "learning-rate",
            f"training.learning_rate {rate:g} is one of LoRA; {kind} fine-tuning's best is about "
            "ten times lower",
            f"try {rate / 10:g}.",
        )


def _dtype(trainable: Trainable) -> Iterator[Finding]:
    if any(p.dtype == torch.float16 for p in trainable.model.parameters()):
        yield Finding(
            "warning",
            "dtype",
            "float16 training has no loss scaling here: small gradients become zero",
            "set model.dtype to 'bfloat16'.",
        )


def _listed(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
