"""`loralab evaluate` of image runs: the trained adapters judged again."""

from pathlib import Path
from typing import Any

from loralab.adapters import load_adapter
from loralab.errors import ConfigError
from loralab.events import Listener, Phase, ignore
from loralab.files import write_json, write_json_lines
from loralab.runs.folder import Run
from loralab.runs.images.subject import ImageSubject, Judgement, open_subject

BASE = "base"
SPLIT = "images"


def evaluate_images(
    run: Run, *, data: str | None = None, split: str = "test", listen: Listener = ignore
) -> dict[str, Any]:
    """Draw with the run's adapters and judge the images; the run's `evaluation/` is written anew.

    Raises `RunError` where the run is not finished, `ConfigError` for other data.
    """
    if data is not None or split != "test":
        raise ConfigError(
            f"{run.folder} is a run of an image model: it is judged on images that it draws",
            "leave out --data and --split.",
        )
    subject = open_trained(run, listen)
    judgement = subject.judge(run.folder, listen)
    return store_judgement(run, judgement)


def open_trained(run: Run, listen: Listener) -> ImageSubject:
    """The run's subject, its model hosting the trained adapters.

    Raises `AdapterError` where the base is another than the one they were trained on.
    """
    run.check_finished()
    subject = open_subject(run.config, listen, base_of(run, listen))
    listen(Phase("loading the adapters"))
    for name in run.manifest["adapters"]:
        load_adapter(subject.model, run.folder / name, name)
    return subject


def base_of(run: Run, listen: Listener) -> Path:
    """The folder of the run's base.

    One inside the run's folder, put there to carry both elsewhere, comes first. One that is no
    longer where it was is found, or trained, by its name again.
    """
    places = (run.folder / BASE, Path(run.manifest["base"]["folder"]))
    known = next((place for place in places if place.is_dir()), None)
    return open_subject(run.config, listen).base if known is None else known


def store_judgement(run: Run, judgement: Judgement) -> dict[str, Any]:
    """Write the figures and a row an image into the run's `evaluation/`; the figures."""
    document = {"run": str(run.folder), **judgement.document}
    write_json_lines(run.folder / "evaluation" / f"{SPLIT}.jsonl", judgement.rows)
    write_json(run.folder / "evaluation" / f"{SPLIT}.json", document)
    return document
