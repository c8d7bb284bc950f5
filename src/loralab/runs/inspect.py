"""`loralab inspect`: what is inside an adapter, or between a tuned checkpoint and its base."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralab.adapters import (
    CONFIG_FILE,
    Adapter,
    adapter_of_difference,
    read_adapter,
    write_adapter,
)
from loralab.errors import ConfigError, RunError
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.evidence.xray import XRay, figures, summarise, xray, xray_difference
from loralab.imaging import DIGITS_BASE, digits_base
from loralab.models import StoredWeights
from loralab.reports import write_xray_report
from loralab.runs.activations import activation_dimensions
from loralab.runs.folder import MANIFEST, Run, open_run, refuse_existing, refuse_other_file


@dataclass(frozen=True)
class Source:
    """What is looked at: an adapter folder, or a whole checkpoint (`adapter` is None)."""

    name: str
    folder: str
    adapter: Adapter | None
    run: Run | None = None

    @property
    def base(self) -> str | None:
        """The base's name, where the run or the adapter's file says it."""
        if self.run is not None:
            return self.run.config.model.name
        return self.adapter.facts.get("base_model") if self.adapter is not None else None


def inspect(
    source: str | Path,
    *,
    base: str | None = None,
    against: Sequence[str | Path] = (),
    data: str | None = None,
    extract: int | None = None,
    output: str | Path | None = None,
    directions: bool = True,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """The X-ray of `source` (an adapter, a run or a checkpoint) as plain data.

    base: a model's name or folder; needed for a checkpoint, unless it is a run's. against: other
    adapters. data: rows (a catalogue name or a file) on which the dimension of the activations is
    measured before and after. extract: the rank of the adapter that is made of a checkpoint's
    difference and written to the folder `output`; else `output` is where the HTML report goes.

    Returns summary (sentences), figures, xray, and dimensions and extracted where asked for. Raises
    `AdapterError` for what does not fit together, `ConfigError` for what is missing.
    """
    started = time.perf_counter()
    subject = open_source(source)
    if base == DIGITS_BASE:
        base = str(digits_base(listen=listen) / "unet")
    _check_options(subject, base, against, data, extract, output)
    found = _look(subject, base, against, directions, listen)
    document: dict[str, Any] = {
        "source": str(source),
        "kind": "checkpoint" if subject.adapter is None else "adapter",
        "base": found.base,
        "summary": summarise(found),
        "figures": figures(found),
    }
    if data is not None:
        named = base or subject.base
        assert named is not None  # `_check_options` has seen to it
        listen(Phase(f"activations on {data}, before and after"))
        config = None if subject.run is None else subject.run.config
        rows = activation_dimensions(named, subject.folder, subject.adapter, data, config=config)
        document["dimensions"] = [asdict(row) for row in rows]
        document["summary"].append(_dimension_sentence(document["dimensions"]))
    if extract is not None and output is not None:
        listen(Phase(f"the best adapter of rank {extract}"))
        document["extracted"] = _extract(subject, str(found.base), extract, Path(output))
        document["summary"].append(_extract_sentence(document["extracted"]))
    document["seconds"] = time.perf_counter() - started
    document["xray"] = found.to_dict()
    if output is not None:
        page = Path(output) if extract is None else Path(output) / "report.html"
        write_xray_report(document, page)
        document["report"] = str(page)
    elif found.base is None and subject.base is not None:
        listen(Note(f"with --base {subject.base} it is also compared with its base's weights"))
    return document


def open_source(source: str | Path) -> Source:
    """An adapter's folder, a finished run, or a checkpoint (a folder or a model's name).

    Raises `RunError` for a run that is not finished, or trained the head alone.
    """
    path = Path(source)
    if (path / MANIFEST).is_file():
        run = open_run(path)
        folder = run.artifact
        if folder.name == "head":
            raise RunError(
                f"{source} trained the head alone: nothing of the base was changed",
                "give a run of method lora, frozen or full.",
            )
        adapter = read_adapter(folder) if folder.name == "adapter" else None
        return Source(str(source), str(folder), adapter, run)
    is_model = (path / "config.json").is_file() or not path.is_dir()
    if (path / CONFIG_FILE).is_file() or not is_model:
        return Source(str(source), str(path), read_adapter(path))
    return Source(str(source), str(source), None)


def _check_options(
    subject: Source,
    base: str | None,
    against: Sequence[str | Path],
    data: str | None,
    extract: int | None,
    output: str | Path | None,
) -> None:
    faults = []
    if subject.adapter is None and base is None and subject.base is None:
        faults.append(
            f"{subject.name} is a whole checkpoint, and --base is missing"
            if Path(subject.folder).exists()
            else f"there is no folder {subject.name}, and as a model's name it needs --base"
        )
    if subject.adapter is None and against:
        faults.append("--against compares adapters; extract one first (--extract RANK)")
    if subject.adapter is not None and extract is not None:
        faults.append("--extract makes an adapter of a checkpoint, and this is an adapter already")
    if extract is not None and output is None:
        faults.append("--extract needs --output, the new adapter's folder")
    if data is not None and base is None and subject.base is None:
        faults.append("--data runs the model, and --base is missing")
    if faults:
        raise ConfigError(
            "; ".join(faults), "name the model it was tuned from: --base smollm2, or its folder."
        )
    if output is not None and extract is not None:
        refuse_existing(Path(output))
    elif output is not None:
        refuse_other_file(Path(output))


def _look(
    subject: Source,
    base: str | None,
    against: Sequence[str | Path],
    directions: bool,
    listen: Listener,
) -> XRay:
    if subject.adapter is None:
        named = base or subject.base
        assert named is not None
        tuned, weights = StoredWeights(subject.folder), StoredWeights(named)
        listen(Phase("weights", len(tuned.names), "tensors"))
        return xray_difference(
            tuned,
            weights,
            name=subject.name,
            base=named,
            directions=directions,
            tick=_ticker(listen),
        )
    listen(Phase("modules", len(subject.adapter.pairs), "modules"))
    return xray(
        subject.adapter,
        name=subject.name,
        weights=None if base is None else StoredWeights(base),
        base=base,
        against={str(other): _other(other) for other in against},
        directions=directions,
        tick=_ticker(listen),
    )


def _ticker(listen: Listener) -> Callable[[int], None]:
    return lambda done: listen(Progress(done))


def _other(source: str | Path) -> Adapter:
    other = open_source(source)
    if other.adapter is None:
        raise ConfigError(f"{source} is no adapter", "give an adapter's folder or a LoRA run.")
    return other.adapter


def _extract(subject: Source, base: str, rank: int, output: Path) -> dict[str, Any]:
    tuned, weights = StoredWeights(subject.folder), StoredWeights(base)
    found = adapter_of_difference(tuned.structure(), weights.read, tuned.read, rank)
    write_adapter(found.adapter, output)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return {
        "adapter": str(output),
        "rank": rank,
        "kept_share": found.kept_share,
        "kept": dict(found.kept),
        "whole": list(found.whole),
        "notes": list(found.notes),
        "adapter_bytes": size,
        "checkpoint_bytes": tuned.num_bytes,
    }


def _extract_sentence(extracted: dict[str, Any]) -> str:
    whole = len(extracted["whole"])
    exactly = f"; {whole} tensors (head, norms, biases) are in it exactly" if whole else ""
    return (
        f"The best rank-{extracted['rank']} adapter keeps {extracted['kept_share']:.1%} of the"
        f" squared norm of the change{exactly}."
    )


def _dimension_sentence(rows: list[dict[str, Any]]) -> str:
    last = rows[-1]
    before, after = last["before"], last["after"]
    return (
        f"The last hidden state of {before['num_points']} rows lies on about"
        f" {before['intrinsic']:.1f} dimensions before and {after['intrinsic']:.1f} after"
        f" (95 % intervals {before['low']:.1f}-{before['high']:.1f} and"
        f" {after['low']:.1f}-{after['high']:.1f}); as directions of equal variance,"
        f" {before['linear']:.1f} and {after['linear']:.1f}."
    )
