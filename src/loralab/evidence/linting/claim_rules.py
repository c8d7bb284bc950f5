"""Rules on the evidence, and on what is claimed with it."""

from collections.abc import Iterator
from math import sqrt

from loralab.evidence.linting.experiment import Claim, Experiment
from loralab.evidence.linting.findings import Said, rule

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DETECTABLE = 2.80  # standard errors of a difference that shows in 80 % of repeats at the 5 % level
WIDE = 0.02  # half-width of an interval that a claim should state


@rule("selected-on-test", "error")
def selected_on_test(experiment: Experiment) -> Iterator[Said]:
    """Choosing on the rows that are then reported makes the report too good."""
    if experiment.selected_on == "test":
        yield (
            "rates or checkpoints were chosen on the test rows",
            "the figures are the best of several draws on the same rows",
            "choose on validation rows, and test once.",
        )


@rule("predictions-not-saved", "error")
def predictions_not_saved(experiment: Experiment) -> Iterator[Said]:
    """Without rows nobody can test the difference, or look at it again."""
    if experiment.predictions_saved is False:
        yield (
            "no predictions were saved, so that no paired test is possible afterwards",
            "only totals are known",
            "save each row's prediction and log-likelihood.",
        )


@rule("difference-untested", "error")
def difference_untested(experiment: Experiment) -> Iterator[Said]:
    """A difference without an interval."""
    for claim in _of(experiment, "difference"):
        if claim.tested is False:
            yield (
                f"a difference is claimed without an interval or a test: {claim.text!r}",
                "a threshold on the difference is no test",
                "give its 95 % interval, paired by row, with the spread between seeds.",
            )


@rule("below-detectable", "error")
def below_detectable(experiment: Experiment) -> Iterator[Said]:
    """The difference is smaller than what so many rows could show."""
    rows = experiment.data.test_rows
    for claim in _of(experiment, "difference"):
        one, two = experiment.arm(claim.arm), experiment.arm(claim.against)
        if not rows or one is None or two is None or claim.tested:
            continue
        if one.accuracy is None or two.accuracy is None:
            continue
        p = (one.accuracy + two.accuracy) / 2
        smallest = DETECTABLE * sqrt(2 * p * (1 - p) / rows)
        difference = abs(one.accuracy - two.accuracy)
        if difference < smallest:
            yield (
                f"{one.name} and {two.name} differ by less than these rows could show",
                f"{100 * difference:.1f} points on {rows:,} rows; unpaired, {100 * smallest:.1f}"
                " points show in 80 % of repeats",
                "use more rows, or a paired test with saved predictions.",
            )


@rule("small-sample", "info")
def small_sample(experiment: Experiment) -> Iterator[Said]:
    """An accuracy on few rows without its interval."""
    for claim in _of(experiment, "accuracy"):
        if claim.rows and claim.share is not None and not claim.tested:
            half = 1.96 * sqrt(claim.share * (1 - claim.share) / claim.rows)
            if half > WIDE:
                yield (
                    f"an accuracy on {claim.rows} rows stands without its interval",
                    f"{claim.share:.1%} ± {100 * half:.1f} points",
                    "state the interval beside it.",
                )


@rule("part-of-the-test-set", "info")
def part_of_the_test_set(experiment: Experiment) -> Iterator[Said]:
    """Fewer test rows than there are."""
    data = experiment.data
    if data.test_rows and data.available_test_rows and data.test_rows < data.available_test_rows:
        yield (
            "only a part of the test set was used",
            f"{data.test_rows:,} of {data.available_test_rows:,} rows",
            "test on all rows; testing is cheap beside training.",
        )


@rule("oom-under-foreach", "error")
def oom_under_foreach(experiment: Experiment) -> Iterator[Said]:
    """Out of memory under an optimiser that makes a whole copy of the parameters by default."""
    for claim in _of(experiment, "out-of-memory"):
        if claim.optimizer_path != "foreach" or claim.ran is False:
            continue
        evidence = "AdamW's foreach path needs one temporary of the size of all parameters"
        if claim.parameters and claim.capacity_gib:
            held = 4 * claim.parameters * BYTES["float32"] / GIB
            with_copy = held * 5 / 4
            evidence += (
                f": weights, gradients and moments {held:.2f} GiB, with it {with_copy:.2f} GiB of"
                f" {claim.capacity_gib:g}"
            )
            if held >= claim.capacity_gib:
                continue  # out of memory either way
        yield (
            f"an out-of-memory claim rests on AdamW's default path: {claim.text!r}",
            evidence,
            "repeat it with fused=True, and with activation checkpointing.",
        )


@rule("skipped-counts-as-failed", "error")
def skipped_counts_as_failed(experiment: Experiment) -> Iterator[Said]:
    """The record says "failed" for an arm that was left out."""
    for claim in experiment.claims:
        if claim.counted_as_failed_when_skipped:
            yield (
                f"a run that was skipped is recorded as failed: {claim.text!r}",
                "the same record appears without the attempt",
                "record the error itself, and nothing for what was not run.",
            )


@rule("never-run", "error")
def never_run(experiment: Experiment) -> Iterator[Said]:
    """A result of something that was not done."""
    for claim in experiment.claims:
        if claim.ran is False:
            yield (
                f"claimed and never run: {claim.text!r}",
                "no run stands behind it",
                "run it, or leave the claim out.",
            )


@rule("evidence-missing", "warning")
def evidence_missing(experiment: Experiment) -> Iterator[Said]:
    """A claim whose figures are nowhere."""
    for claim in experiment.claims:
        if claim.evidence in ("comment", "none") and claim.ran is not False:
            where = "only a comment" if claim.evidence == "comment" else "nothing"
            yield (
                f"no record stands behind a claim: {claim.text!r}",
                f"{where} holds its figures",
                "keep the log and the figures with the run.",
            )
    if experiment.missing_files:
        yield (
            "files that the text points to are not there",
            ", ".join(experiment.missing_files),
            "publish them with the code.",
        )


@rule("ratio-of-an-attempt", "error")
def ratio_of_an_attempt(experiment: Experiment) -> Iterator[Said]:
    """A ratio over a batch that was tried, not over the largest that fits."""
    for claim in _of(experiment, "larger-batch"):
        if claim.found_maximum is False:
            sizes = f"{claim.batch_size} over {claim.other_batch_size}"
            yield (
                f"a batch ratio divides by an attempt, not by a maximum: {claim.text!r}",
                f"{sizes}; the largest batch that fits was searched for in neither",
                "find the largest batch of each arm under the same settings.",
            )


@rule("accuracy-over-parameters", "error")
def accuracy_over_parameters(experiment: Experiment) -> Iterator[Said]:
    """A ratio that a coin flip with one parameter wins."""
    for claim in _of(experiment, "parameter-efficiency"):
        yield (
            f"accuracy divided by parameters measures nothing: {claim.text!r}",
            "a classifier that guesses has one parameter and 50 % accuracy, 500,000 per million"
            " parameters: nothing that learns comes near it",
            "show accuracy and parameters side by side.",
        )


@rule("cost-setting", "warning")
def cost_setting(experiment: Experiment) -> Iterator[Said]:
    """Memory and time claimed under settings that nobody would pay for."""
    costs = _of(experiment, "out-of-memory", "larger-batch", "cheaper")
    plain = [arm for arm in experiment.arms if arm.dtype == "float32" and arm.autocast is False]
    padded = experiment.data.padding == "max_tokens"
    if costs and (plain or padded):
        told = [f"{arm.name} in float32 without autocast" for arm in plain]
        told += [f"every row padded to {experiment.data.max_tokens} tokens"] if padded else []
        yield (
            "memory and time were measured under settings that double them",
            "; ".join(told),
            "measure in bfloat16 with batches of equal length, or state it with the claim.",
        )


@rule("saving-not-shown", "warning")
def saving_not_shown(experiment: Experiment) -> Iterator[Said]:
    """Said to be cheaper, and the clock says otherwise."""
    for claim in _of(experiment, "cheaper"):
        one, two = experiment.arm(claim.arm), experiment.arm(claim.against)
        if one is None or two is None or not one.seconds or not two.seconds:
            continue
        if one.seconds > 0.95 * two.seconds:
            yield (
                f"a saving is claimed that the time does not show: {claim.text!r}",
                f"{one.name} {one.seconds:g} s, {two.name} {two.seconds:g} s",
                "report time and peak memory of both arms.",
            )


@rule("regularisation-unshown", "warning")
def regularisation_unshown(experiment: Experiment) -> Iterator[Said]:
    """Overfitting is said to be prevented where nothing overfitted."""
    for claim in _of(experiment, "regularisation"):
        losses = [
            (arm.name, arm.loss, arm.validation_loss)
            for arm in experiment.arms
            if arm.loss is not None and arm.validation_loss is not None
        ]
        if losses and all(train >= held for _, train, held in losses):
            yield (
                f"overfitting is said to be prevented where none was seen: {claim.text!r}",
                "; ".join(f"{n}: training {t:g}, validation {v:g}" for n, t, v in losses),
                "train an arm without it until it overfits, and compare.",
            )


@rule("floating-versions", "warning")
def floating_versions(experiment: Experiment) -> Iterator[Said]:
    """Nobody can repeat it with the same code."""
    if experiment.versions == "floating":
        yield (
            "the versions of the libraries are not pinned",
            "lower bounds, or the head of a branch",
            "record the exact versions with each run.",
        )


@rule("results-by-time", "warning")
def results_by_time(experiment: Experiment) -> Iterator[Said]:
    """The newest file need not be the right one."""
    if experiment.results_found_by == "modification time":
        yield (
            "figures are read from the newest file, whichever that is",
            "after a clone all files are equally new",
            "name the run that each figure comes from.",
        )


def _of(experiment: Experiment, *kinds: str) -> list[Claim]:
    return [claim for claim in experiment.claims if claim.kind in kinds]
