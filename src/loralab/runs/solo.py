"""Peak memory and seconds a step, always from a run alone in a fresh process.

In a process that has trained before, the allocator's high-water marks and caches are inherited, so
`measure` starts `python -m loralab.runs.solo CONFIG` and reads one JSON document from it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loralab.config import RunConfig, load_config
from loralab.data import Encoded
from loralab.errors import TrainingError
from loralab.events import ignore
from loralab.measuring import median_step_seconds, peak_live_bytes
from loralab.runs.workbench import open_workbench
from loralab.training import lay_out, repeatable_step


def measure(config: RunConfig, *, num_steps: int) -> dict[str, Any]:
    """`peak_bytes` and `step_seconds` of `config`'s training step.

    Raises `TrainingError` where the fresh process fails, with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="loralab-solo-") as folder:
        recipe = Path(folder) / "config.toml"
        recipe.write_text(config.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "loralab.runs.solo", str(recipe), str(num_steps)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise TrainingError(
            f"measuring {config.method.kind} in a fresh process failed: {last[0]}",
            "free some memory, or make training.batch_size smaller.",
        )
    return json.loads(ran.stdout)


def measure_here(config: RunConfig, *, num_steps: int) -> dict[str, Any]:
    """The same figures from this process: the run's first steps, and its largest batch.

    Seconds: median over the first `num_steps` batches, the same ones for every method. Bytes: two
    steps on the batch with the most padded tokens. A cached prefix is a convenience of repeated
    runs, so it is switched off here: the step is the method's own.
    """
    bench = open_workbench(config, ignore)
    trainable = bench.trainable(config)
    rows = bench.rows["train"]
    batches = lay_out(rows, config.training).batches(1)
    largest = max(batches, key=lambda batch: _padded_tokens(rows, batch))
    peak = peak_live_bytes(
        repeatable_step(trainable, [rows[i] for i in largest]), device=trainable.device
    )
    timed = [[rows[i] for i in batch] for batch in batches[:num_steps]]
    seconds = median_step_seconds(
        repeatable_step(trainable, *timed),
        device=trainable.device,
        warmup=1,
        repeats=len(timed),
    )
    return {"peak_bytes": peak, "step_seconds": seconds, "batch_size": config.training.batch_size}


def _padded_tokens(rows: list[Encoded], batch: list[int]) -> int:
    return len(batch) * max(len(rows[index].input_ids) for index in batch)


if __name__ == "__main__":
    figures = measure_here(load_config(sys.argv[1]), num_steps=int(sys.argv[2]))
    sys.stdout.write(json.dumps(figures))
