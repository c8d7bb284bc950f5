"""`loralab merge`: an adapter inside plain weights, with a certificate of what that cost."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.adapters import load_adapter, merge as merge_into, merge_checkpoint, save_merged
from loralab.data import Encoded
from loralab.errors import ConfigError, RunError
from loralab.events import Listener, Phase, ignore
from loralab.runs.folder import MANIFEST, open_run, refuse_existing
from loralab.runs.workbench import base_model, open_workbench
from loralab.training import ADAPTER_NAME

NUM_PROBES = 32


def merge(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    limit: float | None = None,
    force: bool = False,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Merge a finished run's adapter, or an adapter folder into the checkpoint folder `base`.

    A run is merged with probes (texts of its validation rows), so that its certificate says how
    much of the adapter's effect is kept. A checkpoint is merged shard by shard, never whole in
    memory. Returns the certificate. Raises `OutputError` where `output` exists, `AdapterError`
    where more than `limit` of the effect would be lost and not `force`.
    """
    source, output = Path(source), Path(output)
    refuse_existing(output)
    if not (source / MANIFEST).is_file():
        if base is None:
            raise ConfigError(
                f"{source} is no run, so its base is not known",
                "name the base's folder: loralab merge ADAPTER --base FOLDER --output FOLDER.",
            )
        listen(Phase("merging shard by shard"))
        certificate = merge_checkpoint(base, source, output, limit=limit, force=force)
        return certificate.to_dict()
    return _merge_run(source, output, limit, force, listen)


def _merge_run(
    source: Path, output: Path, limit: float | None, force: bool, listen: Listener
) -> dict[str, Any]:
    run = open_run(source)
    if run.artifact.name != "adapter":
        raise RunError(
            f"{source} was trained by {run.config.method.kind} and has no adapter to merge",
            f"its weights are plain already: {run.artifact}.",
        )
    bench = open_workbench(run.config, listen)
    listen(Phase("merging"))
    model = base_model(run.config)
    load_adapter(model, run.artifact, name=ADAPTER_NAME)
    probes = [_as_inputs(row) for row in bench.rows["validation"][:NUM_PROBES]]
    merged, certificate = merge_into(
        model.eval(), ADAPTER_NAME, probes or None, limit=limit, force=force
    )
    save_merged(merged, certificate, output, bench.tokenizer)
    return certificate.to_dict()


def _as_inputs(row: Encoded) -> dict[str, Tensor]:
    ids = torch.tensor([row.input_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
