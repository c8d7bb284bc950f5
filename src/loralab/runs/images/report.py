"""A finished run of an image model as plain data for its report."""

import base64
from typing import Any

from loralab.imaging import Sheet
from loralab.runs.describe import files_of, timing_of
from loralab.runs.folder import Run
from loralab.runs.images.subject import Judgement
from loralab.runs.tables import shell_word

PURPOSES = {
    "config.toml": "every setting",
    "manifest.json": "versions, machine, base, data order",
    "metrics.jsonl": "a row a step and an adapter",
    "timing.jsonl": "seconds a step",
    "evaluation": "a row a judged image, and the figures",
    "grid.png": "the images of this page",
    "samples": "images of the validation prompts on the way",
}


def image_report(run: Run, judgement: Judgement) -> dict[str, Any]:
    """What `reports.write_image_report` draws."""
    steps = [row for row in run.rows_of("metrics.jsonl") if "loss" in row]
    names = list(run.manifest["adapters"])
    first = [row for row in steps if row["adapter"] == names[0]]
    roles = first[0]["learning_rates"] if first else {}
    adapters = {name: f"the adapter {name}, in PEFT's format" for name in names}
    return {
        "run": str(run.folder),
        "method": run.config.method.kind,
        "model": run.config.model.name,
        "seed": run.config.training.seed,
        "steps": run.manifest["steps_done"],
        "adapters": names,
        "sheets": [_sheet(sheet) for sheet in judgement.sheets],
        "judged": judgement.document,
        "train": {
            name: [[row["step"], row["loss"]] for row in steps if row["adapter"] == name]
            for name in names
        },
        "learning_rates": {
            role: [[row["step"], row["learning_rates"][role]] for row in first] for role in roles
        },
        "findings": run.manifest["findings"],
        "parameters": {
            "trainable": run.manifest["trainable_parameters"],
            "total": run.manifest["total_parameters"],
            "artifact_bytes": run.manifest["artifact_bytes"],
        },
        "timing": timing_of(run),
        "commands": [
            {
                "purpose": "draw",
                "command": f"loralab generate {run.folder} {shell_word(run.manifest['example'])}"
                " --image out.png",
            },
            {"purpose": "judge again", "command": f"loralab evaluate {run.folder}"},
            {
                "purpose": "look inside an adapter",
                "command": f"loralab inspect {run.folder / names[0]}",
            },
            {
                "purpose": "put an adapter into the weights",
                "command": f"loralab merge {run.folder / names[0]} --output merged",
            },
        ],
        "files": files_of(run, {**PURPOSES, **adapters}),
        "data": run.manifest["data"],
        "settings": run.config.tables(),
        "machine": run.manifest["machine"],
        "versions": run.manifest["versions"],
    }


def _sheet(sheet: Sheet) -> dict[str, Any]:
    return {
        "title": sheet.title,
        "caption": sheet.caption,
        "columns": list(sheet.columns),
        "strips": [
            {
                "label": strip.label,
                "detail": strip.detail,
                "png": base64.b64encode(strip.png()).decode("ascii"),
            }
            for strip in sheet.strips
        ],
    }
