"""`loralab doctor`: check a recipe on the real model and data, up to the second step."""

from dataclasses import asdict

from loralab.config import RunConfig
from loralab.errors import TrainingError
from loralab.events import Listener, Phase, ignore
from loralab.runs.images import examine_images
from loralab.runs.workbench import open_workbench, settle_dtype
from loralab.training import Finding, examine as examine_trainable


def examine(config: RunConfig, *, listen: Listener = ignore) -> list[dict[str, str]]:
    """What the doctor finds before the first step and in the gradients of the first two.

    Leaves nothing on disk. Raises what `train` would raise for settings, data or a model that
    cannot be used at all.
    """
    config = settle_dtype(config, listen)
    if config.model.task == "image":
        return [asdict(finding) for finding in examine_images(config, listen)]
    bench = open_workbench(config, listen)
    trainable = bench.trainable(config)
    listen(Phase("two training steps"))
    try:
        findings = examine_trainable(trainable, bench.rows["train"])
    except TrainingError as error:
        findings = [Finding("error", "not-finite", error.cause, error.next_step)]
    return [asdict(finding) for finding in findings]
