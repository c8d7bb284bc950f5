"""The probe file: what a base says to some texts with its adapter, without it, and in between.

It lies beside an export and lets a server be asked whether it applies the adapter. Log-likelihoods
are kept for the adapter as it is, for none, for other scales and for parts of it, so that a server
that does something else can be told what it does.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loralab.errors import ConfigError
from loralab.files import write_json

FORMAT = "loralab server probes"
VERSION = 1
BASE, ADAPTER = "base", "adapter"
MAX_FILE_BYTES = 1 << 26
Numbers = tuple[float | int, ...]


@dataclass(frozen=True)
class ServerProbe:
    """One text and what each variant says to it, in nats.

    choices: tokens that may come next (number, text), or a classifier's labels.
    tokens: variant -> the log-likelihood of every token after the first; empty for classifiers.
    next: variant -> the log-likelihoods of the choices.
    continuation: variant -> what follows greedily; for the adapter and the base alone.
    """

    text: str
    token_ids: tuple[int, ...]
    choices: tuple[tuple[int, str], ...]
    tokens: Mapping[str, Numbers]
    next: Mapping[str, Numbers]
    continuation: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeFile:
    """All probes of one export.

    scales: variant -> the factor before the adapter's pairs; 0 and 1 are among them.
    original: rank, alpha and scaling as they were trained, for naming a wrong factor's cause.
    """

    name: str
    base: str
    task: Literal["causal", "classification"]
    adapter_sha256: str
    probes: tuple[ServerProbe, ...]
    scales: Mapping[str, float | int]
    original: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        """Every variant that all probes have answers of."""
        return tuple(self.probes[0].next)

    @property
    def zero(self) -> str:
        """The variant without the adapter's pairs."""
        return next(name for name, factor in self.scales.items() if factor == 0)

    @property
    def effect(self) -> float:
        """What the adapter changes: root mean square of nats a token (or label)."""
        kept = "tokens" if self.task == "causal" else "next"
        differences = [
            one - other
            for probe in self.probes
            for one, other in zip(
                getattr(probe, kept)[ADAPTER], getattr(probe, kept)[BASE], strict=True
            )
        ]
        return math.sqrt(sum(d * d for d in differences) / max(1, len(differences)))


def write_probe_file(probes: ProbeFile, path: Path) -> None:
    """Writes the file, whole or not at all."""
    body = _body(probes)
    write_json(path, {"format": FORMAT, "version": VERSION, "checksum": _checksum(body), **body})


def read_probe_file(path: str | Path) -> ProbeFile:
    """Reads it back. Raises `ConfigError` for a file that is missing, damaged or another thing."""
    path = Path(path)
    if path.is_dir():
        path = path / "probes.json"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _damaged(path, "is larger than any probe file")
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror})",
            "give the probes.json that `loralab export` wrote.",
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is no JSON ({error})") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        hint = ""
        if isinstance(told, dict) and "adapter" in told and "probes" in told:
            hint = " (it is an adapter's own probes.json, which holds no texts)"
        raise ConfigError(
            f"{path} is no probe file of an export{hint}",
            "give the probes.json at the top of the folder that `loralab export` wrote.",
        )
    if told.get("version") != VERSION:
        raise ConfigError(
            f"{path} is of version {told.get('version')!r}, known is {VERSION}",
            "export again with this version of loralab.",
        )
    body = {k: v for k, v in told.items() if k not in ("format", "version", "checksum")}
    if told.get("checksum") != _checksum(body):
        raise _damaged(path, "differs from what was saved")
    try:
        return _parsed(body)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise _damaged(path, f"lacks what it should hold ({error!r})") from None


def _damaged(path: Path, how: str) -> ConfigError:
    return ConfigError(f"{path} {how}", "export again with `loralab export`.")


def _body(probes: ProbeFile) -> dict[str, Any]:
    return {
        "name": probes.name,
        "base": probes.base,
        "task": probes.task,
        "adapter_sha256": probes.adapter_sha256,
        "effect_nats": round(probes.effect, 6),
        "original": dict(probes.original),
        "scales": dict(probes.scales),
        "probes": [
            {
                "text": probe.text,
                "token_ids": list(probe.token_ids),
                "choices": [list(choice) for choice in probe.choices],
                "tokens": _rounded(probe.tokens),
                "next": _rounded(probe.next),
                "continuation": dict(probe.continuation),
            }
            for probe in probes.probes
        ],
    }


def _parsed(body: dict[str, Any]) -> ProbeFile:
    probes = tuple(
        ServerProbe(
            text=str(row["text"]),
            token_ids=tuple(int(number) for number in row["token_ids"]),
            choices=tuple((int(number), str(text)) for number, text in row["choices"]),
            tokens=_numbers(row["tokens"]),
            next=_numbers(row["next"]),
            continuation={str(k): str(v) for k, v in row["continuation"].items()},
        )
        for row in body["probes"]
    )
    if not probes:
        raise ValueError("no probes")
    found = ProbeFile(
        name=str(body["name"]),
        base=str(body["base"]),
        task="classification" if body["task"] == "classification" else "causal",
        adapter_sha256=str(body["adapter_sha256"]),
        probes=probes,
        scales={str(name): float(factor) for name, factor in body["scales"].items()},
        original=dict(body["original"]),
    )
    for probe in probes:
        _ = [probe.next[name] for name in (found.zero, ADAPTER, BASE, *found.scales)]
    return found


def _numbers(table: Mapping[str, Any]) -> dict[str, Numbers]:
    found = {str(name): tuple(float(value) for value in row) for name, row in table.items()}
    if not all(math.isfinite(value) for row in found.values() for value in row):
        raise ValueError("a number that is not finite")
    return found


def _rounded(table: Mapping[str, Numbers]) -> dict[str, list[float]]:
    return {name: [round(float(value), 6) for value in row] for name, row in table.items()}


def _checksum(body: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
