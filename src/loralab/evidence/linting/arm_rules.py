"""Rules on what differs between the arms besides what is compared."""

from collections.abc import Iterator
from itertools import combinations

from loralab.evidence.linting.experiment import Arm, Experiment
from loralab.evidence.linting.findings import Said, rule

SAME_STEP = 1.5  # first updates within this factor count as the same
SIZE_RATIO = 10  # trained parameters that one clipping norm should not span


@rule("stand-in", "error")
def stand_in(experiment: Experiment) -> Iterator[Said]:
    """An arm is called what it is not."""
    for arm in experiment.arms:
        called = (arm.stands_for or "").lower()
        if "full" in called and arm.method != "full":
            frozen = f"{arm.frozen_layers} layers are frozen" if arm.frozen_layers else arm.method
            yield (
                f"{arm.name} stands for {arm.stands_for}, but does not train the whole model",
                f"{frozen}; {_share(arm)}",
                "add an arm that trains everything, or claim only what was compared.",
            )


@rule("dropout-in-one-arm", "warning")
def dropout_in_one_arm(experiment: Experiment) -> Iterator[Said]:
    """Regularisation that only some arms have is compared along with the method."""
    if len(experiment.arms) < 2:
        return
    with_dropout = [arm for arm in experiment.arms if arm.adapter_dropout]
    without = [arm.name for arm in experiment.arms if _has_no_dropout(arm)]
    if with_dropout and without:
        yield (
            "dropout is in some arms only, and is compared along with the method",
            ", ".join(f"{arm.name} {arm.adapter_dropout:g}" for arm in with_dropout)
            + f"; none in {', '.join(without)}",
            "set it to 0 everywhere, or give every arm the same.",
        )
    heads = {arm.head_dropout for arm in experiment.arms if arm.head_dropout is not None}
    if len(heads) > 1:
        yield (
            "the heads' dropout differs between the arms",
            ", ".join(
                f"{arm.name} {arm.head_dropout:g}"
                for arm in experiment.arms
                if arm.head_dropout is not None
            ),
            "give every arm the same head.",
        )


@rule("data-order-differs", "warning")
def data_order_differs(experiment: Experiment) -> Iterator[Said]:
    """Other batches in each arm: noise that a paired design would not have."""
    orders = {arm.name: arm.data_order for arm in experiment.arms if arm.data_order is not None}
    if len(set(orders.values())) > 1:
        yield (
            "the arms saw their rows in different orders",
            ", ".join(f"{name}: {order[:24]}" for name, order in orders.items()),
            "draw the order from a random stream of its own, and record its hash.",
        )


@rule("rank-and-scale-changed", "error")
def rank_and_scale_changed(experiment: Experiment) -> Iterator[Said]:
    """Two ranks at different first steps: `scale * rank * rate` is what Adam starts with.

    Each entry of B moves by the rate, whatever the gradient, and all components push the same way,
    so that the first update grows with rank * scale (= alpha under alpha/rank).
    """
    arms = [arm for arm in experiment.arms if arm.method == "lora" and arm.rank and arm.scale]
    for one, two in combinations(arms, 2):
        swept = min(len(set(arm.rates_tried or ())) for arm in (one, two)) >= 3
        if one.rank == two.rank or swept:
            continue
        first, second = _first_step(one), _first_step(two)
        ratio = max(first, second) / min(first, second)
        if ratio > SAME_STEP:
            yield (
                f"{one.name} and {two.name} differ in rank and in their first step at once",
                f"rank {one.rank} at scale {one.scale:g}, rank {two.rank} at scale {two.scale:g}:"
                f" the first update differs by a factor of {ratio:.3g}",
                "keep alpha with alpha/rank when the rank changes, or sweep the rate of each arm.",
            )


@rule("steps-differ", "error")
def steps_differ(experiment: Experiment) -> Iterator[Said]:
    """One arm trained longer."""
    steps = {arm.name: arm.steps for arm in experiment.arms if arm.steps}
    batch = {arm.batch_size for arm in experiment.arms if arm.batch_size}
    epochs = {arm.name: arm.epochs for arm in experiment.arms if arm.epochs}
    if len(set(steps.values())) > 1 and len(batch) <= 1:
        counts, of = steps, "steps"
    elif not steps and len(set(epochs.values())) > 1:
        counts, of = epochs, "epochs"
    else:
        return
    yield (
        f"the arms trained for different numbers of {of}",
        ", ".join(f"{name} {count:g}" for name, count in counts.items()),
        "give every arm the same token budget.",
    )


@rule("batch-differs", "warning")
def batch_differs(experiment: Experiment) -> Iterator[Said]:
    """Another batch size is another optimisation."""
    sizes = {arm.name: arm.batch_size for arm in experiment.arms if arm.batch_size}
    if len(set(sizes.values())) > 1:
        yield (
            "the arms trained with different batch sizes",
            ", ".join(f"{name} {size}" for name, size in sizes.items()),
            "use one batch size; accumulate where it does not fit.",
        )


@rule("clip-norm-over-sizes", "warning")
def clip_norm_over_sizes(experiment: Experiment) -> Iterator[Said]:
    """One clipping norm over very different numbers of parameters clips one arm much more."""
    arms = [arm for arm in experiment.arms if arm.max_grad_norm and arm.trainable_parameters]
    swept = any(len(set(arm.rates_tried or ())) >= 3 for arm in arms)
    if len(arms) < 2 or swept:  # a swept rate makes up for it
        return
    low = min(arms, key=lambda arm: arm.trainable_parameters or 0)
    high = max(arms, key=lambda arm: arm.trainable_parameters or 0)
    ratio = (high.trainable_parameters or 0) / (low.trainable_parameters or 1)
    if low.max_grad_norm == high.max_grad_norm and ratio > SIZE_RATIO:
        yield (
            f"one clipping norm for arms whose trained parameters differ {ratio:.0f}-fold",
            f"{low.max_grad_norm:g} over {low.trainable_parameters:,} ({low.name}) and"
            f" {high.trainable_parameters:,} ({high.name})",
            "report how often each arm was clipped, or sweep the rate under it.",
        )


@rule("layer-count", "warning")
def layer_count(experiment: Experiment) -> Iterator[Said]:
    """The text and the model disagree on how many layers there are."""
    has, said = experiment.num_layers, experiment.stated_layers
    if has and said and has != said:
        told = "".join(
            f"; {arm.name} freezes {frozen}: {frozen / has:.0%} of them, not {frozen / said:.0%}"
            for arm in experiment.arms
            if (frozen := arm.frozen_layers)
        )
        yield (
            f"the text says {said} layers, the model has {has}",
            f"{has} by the model's configuration{told}",
            "print what is frozen from the model itself.",
        )


def _has_no_dropout(arm: Arm) -> bool:
    """Told to be zero, or without an adapter that could have any."""
    return arm.adapter_dropout == 0 or (arm.adapter_dropout is None and arm.method != "lora")


def _first_step(arm: Arm) -> float:
    assert arm.rank and arm.scale
    return arm.rank * arm.scale * (arm.learning_rate or 1.0)


def _share(arm: Arm) -> str:
    if not arm.trainable_parameters or not arm.total_parameters:
        return "not all parameters train"
    share = arm.trainable_parameters / arm.total_parameters
    return f"{arm.trainable_parameters:,} parameters train ({share:.1%})"
