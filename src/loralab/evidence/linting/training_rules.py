"""Rules on how each arm was trained."""

from collections.abc import Iterator

from loralab.evidence.linting.experiment import Arm, Experiment
from loralab.evidence.linting.findings import Said, rule

LONG_WARMUP = 0.5  # of the steps
FEW_RATES = 3  # a grid must have one on each side of the best


@rule("warmup-too-long", "error")
def warmup_too_long(experiment: Experiment) -> Iterator[Said]:
    """The rate never, or hardly, reaches what is stated."""
    for arm in experiment.arms:
        share = arm.warmup_share
        if share is None or share < LONG_WARMUP:
            continue
        reached = min(1.0, 1 / share)
        mean = reached / 2 if share >= 1 else 1 - share / 2
        told = (
            f"{arm.warmup_steps} warm-up steps, {arm.steps} steps"
            if arm.steps
            else f"a warm-up of {share:.0%} of the run"
        )
        yield (
            f"{arm.name}: the warm-up takes most of the run, so its learning rate is not what is"
            " stated",
            f"{told}: the rate reaches at most {reached:.0%} of its nominal value, and its mean"
            f" before any decay is {mean:.0%}",
            "warm up for a tenth of the steps or fewer, and state the effective rate.",
        )


@rule("untuned-rate", "error")
def untuned_rate(experiment: Experiment) -> Iterator[Said]:
    """One rate an arm says which rate was lucky, not which method is better."""
    if len(experiment.arms) < 2:
        return
    alone = [arm for arm in experiment.arms if arm.rates_tried is not None]
    alone = [arm for arm in alone if len(set(arm.rates_tried or ())) == 1]
    if alone:
        told = ", ".join(f"{arm.name} {_rates(arm)}" for arm in alone)
        yield (
            "a single learning rate was tried for an arm, so that a better one may turn the result",
            told,
            f"sweep at least {FEW_RATES} rates, a factor of three apart, for every arm.",
        )


@rule("rate-at-edge", "error")
def rate_at_edge(experiment: Experiment) -> Iterator[Said]:
    """The best rate lies at the end of its grid: the method may yet do better."""
    for arm in experiment.arms:
        tried = sorted(set(arm.rates_tried or ()))
        if arm.learning_rate is None or len(tried) < 2:
            continue
        if arm.learning_rate in (tried[0], tried[-1]):
            end = "lowest" if arm.learning_rate == tried[0] else "highest"
            beyond = arm.learning_rate / 3 if end == "lowest" else arm.learning_rate * 3
            yield (
                f"{arm.name}: its best learning rate is the {end} that was tried",
                _rates(arm),
                f"add {beyond:.1e} to its grid, until the best lies inside.",
            )


@rule("few-rates", "warning")
def few_rates(experiment: Experiment) -> Iterator[Said]:
    """Two rates cannot have a best one inside."""
    for arm in experiment.arms:
        if len(set(arm.rates_tried or ())) == 2:
            yield (
                f"{arm.name}: two learning rates cannot show where the best lies",
                _rates(arm),
                f"try at least {FEW_RATES}, a factor of three apart.",
            )


@rule("head-rates-differ", "error")
def head_rates_differ(experiment: Experiment) -> Iterator[Said]:
    """A new head learns at each arm's own rate: a difference between heads, not methods."""
    rates = {
        arm.name: arm.head_learning_rate
        for arm in experiment.arms
        if arm.head_is_new and arm.head_learning_rate is not None
    }
    if len(set(rates.values())) > 1:
        low, high = min(rates.values()), max(rates.values())
        yield (
            "the randomly initialised heads learn at different rates",
            ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            + f": a factor of {high / low:.3g}",
            "sweep the head's rate once, with the base frozen, and share it.",
        )


@rule("frozen-below-trained", "warning")
def frozen_below_trained(experiment: Experiment) -> Iterator[Said]:
    """A trained embedding below frozen layers: the backward pass crosses all of them."""
    for arm in experiment.arms:
        if arm.frozen_layers and arm.embedding_trained:
            yield (
                f"{arm.name}: {arm.frozen_layers} frozen layers lie above a trained embedding",
                "gradients cross every frozen layer to reach it, so that freezing saves neither"
                " that time nor their activations",
                "freeze the embedding too, or freeze nothing below what trains.",
            )


@rule("one-seed", "error")
def one_seed(experiment: Experiment) -> Iterator[Said]:
    """Without a second seed the spread between seeds is unknown."""
    single = [arm.name for arm in experiment.arms if arm.seeds and len(set(arm.seeds)) == 1]
    if single and len(experiment.arms) > 1:
        yield (
            "one seed an arm says nothing of how much a rerun would change",
            ", ".join(single),
            "train at least three seeds at each arm's best rate.",
        )


@rule("last-checkpoint", "warning")
def last_checkpoint(experiment: Experiment) -> Iterator[Said]:
    """Figures of whatever the last step left."""
    last = [arm.name for arm in experiment.arms if arm.restored == "last"]
    if last:
        yield (
            "the figures are of the last step, not of the best checkpoint on validation rows",
            ", ".join(last),
            "restore the checkpoint with the lowest validation loss before testing.",
        )


@rule("undertrained", "warning")
def undertrained(experiment: Experiment) -> Iterator[Said]:
    """Training loss above validation loss at the end of one pass: it was still learning."""
    for arm in experiment.arms:
        if arm.loss is None or arm.validation_loss is None or (arm.epochs or 0) > 1:
            continue
        if arm.loss > arm.validation_loss and len(experiment.arms) > 1:
            yield (
                f"{arm.name}: it was still underfitting when it was stopped",
                f"training loss {arm.loss:g} against validation loss {arm.validation_loss:g} after"
                f" {arm.epochs or 1:g} epoch",
                "train every arm until its validation loss no longer falls.",
            )


def _rates(arm: Arm) -> str:
    tried = ", ".join(f"{rate:g}" for rate in sorted(set(arm.rates_tried or ())))
    return f"tried {tried}" + (
        "" if arm.learning_rate is None else f", shown {arm.learning_rate:g}"
    )
