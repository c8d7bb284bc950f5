"""`loralab doctor`: check a recipe on the real model and data, up to the second step."""

import tempfile
from pathlib import Path

from loralab.config import RunConfig
from loralab.errors import TrainingError
from loralab.events import Listener, Phase, ignore
from loralab.runs.workbench import open_workbench
from loralab.training import Examined, Finding, Started, fit


def examine(config: RunConfig, *, listen: Listener = ignore) -> list[dict[str, str]]:
    """What the doctor finds before the first step and in the gradients of the first two.

    Leaves nothing on disk. Raises what `train` would raise for settings, data or a model that
    cannot be used at all.
    """
    bench = open_workbench(config, listen)
    trainable = bench.trainable(config)
    listen(Phase("two training steps", 2, "steps"))
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="loralab-doctor-") as folder:
        events = fit(trainable, bench.rows["train"], bench.rows["validation"], Path(folder))
        try:
            for event in events:
                if isinstance(event, Started | Examined):
                    findings += event.findings
                if isinstance(event, Examined):
                    break
        except TrainingError as error:
            findings.append(Finding("error", "not-finite", error.cause, error.next_step))
        finally:
            events.close()
    return [
        {
            "level": finding.level,
            "name": finding.name,
            "message": finding.message,
            "next_step": finding.next_step,
        }
        for finding in findings
    ]
