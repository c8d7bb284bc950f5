"""Probes that travel with an adapter: inputs, and what the adapted model said to them.

They lie beside PEFT's two files, in one of their own; who does not know it leaves it alone.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralab.files import write_json

PROBES_FILE = "probes.json"


@dataclass(frozen=True)
class Probe:
    """One input as token ids, so that no tokenizer is needed, and the answer to be expected.

    log_likelihood: in nats, by the adapted model as it was saved. Of a causal model: of all tokens
        after the first, summed; of a classifier: of its most probable class.
    """

    input_ids: tuple[int, ...]
    log_likelihood: float | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", tuple(self.input_ids))


def write_probes(folder: Path, probes: Sequence[Probe], adapter_sha256: str) -> None:
    """Writes the probes of the adapter with that content; none takes a file of others away."""
    file = folder / PROBES_FILE
    if not probes:
        file.unlink(missing_ok=True)
        return
    rows = [asdict(probe) for probe in probes]
    write_json(file, {"adapter": adapter_sha256, "probes": rows, "checksum": _checksum(rows)})


def read_probes(
    folder: Path, adapter_sha256: str | None, faults: list[str], *, of_any: bool = False
) -> tuple[Probe, ...]:
    """The folder's probes; damage, and probes of another adapter, are added to `faults`.

    of_any: probes of another adapter are given too.
    """
    file = folder / PROBES_FILE
    if not file.is_file():
        return ()
    try:
        told = json.loads(file.read_bytes())
        rows = told["probes"]
        intact = told["checksum"] == _checksum(rows) and all(map(_is_probe, rows))
        owner = told["adapter"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        faults.append(f"{PROBES_FILE} is not readable ({error!r})")
        return ()
    if not intact:
        faults.append(f"{PROBES_FILE} differs from what was saved")
    elif not of_any and (adapter_sha256 is None or owner != adapter_sha256):
        faults.append(f"{PROBES_FILE} belongs to another adapter; remove it")
    else:
        return tuple(Probe(tuple(row["input_ids"]), row["log_likelihood"]) for row in rows)
    return ()


def _is_probe(row: Any) -> bool:
    ids, value = row["input_ids"], row["log_likelihood"]
    return (
        bool(ids)
        and all(type(number) is int and number >= 0 for number in ids)
        and type(value) in (int, float)
        and math.isfinite(value)
    )


def _checksum(rows: Any) -> str:
    return f"{zlib.crc32(json.dumps(rows, sort_keys=True).encode()):08x}"
