"""`loralab doctor` of image recipes: each adapter up to its second step."""

from loralab.config import RunConfig
from loralab.errors import TrainingError
from loralab.events import Listener, Phase
from loralab.runs.images.subject import open_subject
from loralab.training import Finding, examine, prepare_many


def examine_images(config: RunConfig, listen: Listener) -> list[Finding]:
    """What the doctor finds of every adapter; what is the same of all is said once."""
    subject = open_subject(config, listen)
    names = list(subject.rows)
    trainables = prepare_many(
        subject.model,
        [(config.method, config.training)] * len(names),
        task=subject.task,
        names=names,
    )
    listen(Phase("two training steps of each adapter"))
    found: dict[str, Finding] = {}
    for name, trainable in zip(names, trainables, strict=True):
        try:
            own = examine(trainable, subject.rows[name])
        except TrainingError as error:
            own = [Finding("error", "not-finite", error.cause, error.next_step)]
        for finding in own:
            if finding.name in ("step", "not-finite"):
                finding = Finding(
                    finding.level, finding.name, f"{name}: {finding.message}", finding.next_step
                )
            found.setdefault(finding.message, finding)
    return list(found.values())
