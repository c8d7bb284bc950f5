"""`loralab export`: an adapter or a merged model for another engine, with what proves it there."""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import Adapter, install, read_adapter, write_adapter
from loralab.catalogue import ENTRIES, fetch
from loralab.errors import ConfigError, DataError, LoralabError, RunError
from loralab.events import Listener, Note, Phase, Progress, ignore
from loralab.exporting import (
    GGUF_TYPES,
    Canonical,
    Engine,
    Exported,
    GGUFType,
    Launch,
    ProbeFile,
    canonical,
    find_engine,
    make_server_probes,
    plan_launch,
    probe_texts,
    write_gguf_adapter,
    write_gguf_model,
    write_probe_file,
)
from loralab.files import replacing, write_json, write_text
from loralab.measuring import log_likelihoods
from loralab.models import StoredWeights, load_model, load_tokenizer, model_folder
from loralab.runs.folder import MANIFEST, Run, open_run, refuse_existing
from loralab.runs.merge import merge
from loralab.runs.subject import task_of
from loralab.runs.workbench import base_model

PROBES = "probes.json"
EXPORTED, TRAINED = "exported", "trained"
LEAST_KEPT = 0.99  # of the effect on probes, where a conversion is said to be exact
NOISE_NATS = 1e-3  # a token: an effect below it cannot be seen on a server

logger = logging.getLogger("loralab")


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how."""

    engine: Engine
    source: Path
    run: Run | None
    adapter: Adapter
    base: str | None
    merged: bool
    rank: int | None
    dtype: GGUFType | None
    name: str
    adapter_only: bool

    @property
    def gguf(self) -> bool:
        return self.engine.form == "gguf"

    @property
    def num_labels(self) -> int:
        """Of a classifier, else 0."""
        if self.run is not None:
            model = self.run.config.model
            return model.num_labels if model.task == "classification" else 0
        return task_of(self.adapter).get("num_labels", 0)

    def known_base(self, why: str) -> str:
        """The base's name. Raises `ConfigError` where nothing says it."""
        if self.base is None:
            raise ConfigError(
                f"{self.source} does not say which base it belongs to, and {why}",
                "name it: --base FOLDER, a catalogue name or a hub id.",
            )
        return self.base


def export(
    source: str | Path,
    output: str | Path,
    *,
    engine: str,
    base: str | None = None,
    merged: bool = False,
    rank: int | None = None,
    dtype: str | None = None,
    name: str | None = None,
    adapter_only: bool = False,
    probes: bool = True,
    texts: Sequence[str] = (),
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Write a run's adapter, or an adapter folder, as `engine` takes it, to the folder `output`.

    merged: the base with the adapter in its weights instead. rank: cut to (or approximate DoRA by)
    that rank. dtype: of a GGUF base, None keeps the stored one. adapter_only: leave the GGUF base
    out. texts: the probes' texts instead of the usual ones.

    Returns what was written, each module's error, the engine's command line and the probes' effect.
    Raises `AdapterError` that lists what the engine would not apply, `ConfigError` for options
    that do not go together, `OutputError` where `output` exists.
    """
    output = Path(output)
    refuse_existing(output)
    request = _request(source, engine, base, merged, rank, dtype, name, adapter_only, output)
    with replacing(output) as aside:
        aside.mkdir()
        if merged:
            facts = _write_merged(request, aside, listen)
            value = request.adapter
        else:
            found = _canonical(request, listen)
            facts = _write_adapter(request, found, aside, listen)
            value = found.adapter
        if probes:
            facts |= _write_probes(request, value, aside, texts, listen)
        launch = _write_launch(request, facts, aside)
        files = sorted(str(f.relative_to(aside)) for f in aside.rglob("*") if f.is_file())
        document = {
            "engine": request.engine.name,
            "facts_of": request.engine.version,
            "form": "merged model" if merged else "adapter",
            "output": str(output),
            "name": request.name,
            "base": request.base,
            "files": [*files, "export.json"],
            **facts,
            "commands": launch.lines,
            "url": launch.url or None,
            "model": launch.model or None,
        }
        write_json(aside / "export.json", document)
    return document


def read_prompts(path: Path) -> tuple[str, ...]:
    """The probes' texts, one a line. Raises `DataError` for a file without any."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})", "check it.") from None
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise DataError(f"{path} holds no text", "write one text a line, 2 to 16 of them.")
    return texts


def _request(
    source: str | Path,
    engine: str,
    base: str | None,
    merged: bool,
    rank: int | None,
    dtype: str | None,
    name: str | None,
    adapter_only: bool,
    output: Path,
) -> Request:
    found, source = find_engine(engine), Path(source)
    gguf = found.form == "gguf"
    faults = []
    if dtype is not None and (not gguf or adapter_only):
        faults.append("--dtype is of a GGUF base, which this export does not write")
    if dtype is not None and dtype not in GGUF_TYPES:
        faults.append(f"--dtype {dtype} is none of {', '.join(GGUF_TYPES)}")
    if adapter_only and (merged or not gguf):
        faults.append("--adapter-only leaves out a GGUF base, which this export does not write")
    if rank is not None and (merged or rank < 1):
        faults.append("--rank is of an adapter and at least 1; a merged model needs none")
    label = name if name is not None else output.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        faults.append(f"{label!r} is no name for an adapter (letters, digits, '.', '_', '-')")
    if faults:
        raise ConfigError("; ".join(faults), "mend them all; see `loralab export --help`.")
    run = open_run(source) if (source / MANIFEST).is_file() else None
    if run is not None and run.artifact.name != "adapter":
        raise RunError(
            f"{source} was trained by {run.config.method.kind} and has no adapter to export",
            f"its weights are whole already: {run.artifact}.",
        )
    adapter = read_adapter(source if run is None else run.artifact)
    known = run.config.model.name if run is not None else adapter.facts.get("base_model")
    return Request(
        engine=found,
        source=source,
        run=run,
        adapter=adapter,
        base=base or known,
        merged=merged,
        rank=rank,
        dtype=dtype,  # type: ignore[arg-type]  (checked above)
        name=label,
        adapter_only=adapter_only,
    )


def _canonical(request: Request, listen: Listener) -> Canonical:
    """The adapter as the engine takes it; the base is opened where the conversion needs it."""
    listen(Phase("making the adapter canonical"))
    engine, adapter = request.engine, request.adapter
    dora = bool(adapter.magnitudes) and "DoRA" not in engine.carries and request.rank is not None
    stored = None
    if request.base is not None and (dora or engine.stacked):
        stored = StoredWeights(request.base)
    found = canonical(
        adapter,
        engine,
        rank=request.rank,
        weights=None if stored is None else stored.read,
        structure=None if stored is None or not engine.stacked else stored.structure(),
    )
    for note in found.notes:
        listen(Note(note))
    return found


def _write_adapter(
    request: Request, found: Canonical, folder: Path, listen: Listener
) -> dict[str, Any]:
    if request.gguf:
        base = request.known_base("GGUF's order of rows depends on it")
        write_gguf_adapter(found.adapter, model_folder(base), folder / "adapter.gguf")
        if not request.adapter_only:
            listen(Phase("writing the base as GGUF"))
            _write_gguf_base(base, request.dtype, folder / "base.gguf")
    else:
        write_adapter(found.adapter, folder / "adapter")
    return {
        "rank": found.rank,
        "largest_error": max(found.errors.values(), default=0.0),
        "errors": dict(found.errors),
        "notes": list(found.notes),
    }


def _write_gguf_base(base: str, dtype: GGUFType | None, path: Path) -> None:
    """The base as GGUF; a catalogue model that is a GGUF file stays the file that it is."""
    entry = ENTRIES.get(base)
    if dtype is None and entry is not None and entry.main.endswith(".gguf"):
        shutil.copyfile(fetch(base) / entry.main, path)
        return
    write_gguf_model(base, path, dtype=dtype)


def _write_merged(request: Request, folder: Path, listen: Listener) -> dict[str, Any]:
    base = request.known_base("a merged model is made of it")
    model = folder / "model"
    whole = str(model_folder(base)) if request.run is None else None
    certificate = merge(request.source, model, base=whole, listen=listen)
    if request.gguf:
        listen(Phase("writing the merged model as GGUF"))
        write_gguf_model(str(model), folder / "model.gguf", dtype=request.dtype)
        shutil.rmtree(model)
    return {"certificate": certificate, "notes": []}


def _write_probes(
    request: Request, value: Adapter, folder: Path, texts: Sequence[str], listen: Listener
) -> dict[str, Any]:
    """The probe file, and the share of the trained adapter's effect that the exported one has."""
    if request.base is None:
        listen(Note("no probe file: the base is not known (--base)", warning=True))
        return {"probes": None}
    try:
        listen(Phase("running the probes", None, "variants"))
        model = _base_in_fp32(request)
        tokenizer = load_tokenizer(request.base)
        install(model, value, EXPORTED)
        found = make_server_probes(
            model,
            EXPORTED,
            tokenizer,
            texts or probe_texts(request.adapter, tokenizer),
            task="classification" if request.num_labels else "causal",
            served_name=request.name,
            base=request.base,
            original=_original(request.adapter),
            tick=lambda done: listen(Progress(done)),
        )
    except DataError:
        raise
    except LoralabError as error:
        listen(Note(f"no probe file: {error.cause}", warning=True))
        return {"probes": None}
    if found.effect < NOISE_NATS:
        logger.warning(
            "the adapter changes the probes by %.1g nats a token: no server can be told from its"
            " base by that; give texts of its task with --prompts",
            found.effect,
        )
    write_probe_file(found, folder / PROBES)
    kept = None if request.merged else _effect_kept(model, request.adapter, found)
    return {
        "probes": {"file": PROBES, "num": len(found.probes), "effect_nats": found.effect},
        "effect_kept": kept,
    }


def _base_in_fp32(request: Request) -> nn.Module:
    """The base as the adapter was trained on it, in fp32: expectations are free of rounding."""
    if request.run is not None:
        changes = {"model__dtype": "float32"}
        if request.base != request.run.config.model.name:
            changes["model__name"] = str(request.base)
        return base_model(request.run.config.replace(**changes)).eval()
    return load_model(str(request.base), **task_of(request.adapter)).eval()


def _effect_kept(model: nn.Module, trained: Adapter, probes: ProbeFile) -> float:
    """1 - (rms of exported - trained) / (rms of trained - base), on the probes' texts."""
    install(model, trained, TRAINED)
    inputs = [probe.token_ids for probe in probes.probes]
    answers = [log_likelihoods(model, inputs, route=route) for route in (EXPORTED, TRAINED)]
    exported, own = torch.tensor(answers, dtype=torch.float64)
    with_nothing = torch.tensor([_total(probe.tokens, probe.next) for probe in probes.probes])
    effect = float((own - with_nothing).norm())
    return 1.0 if effect == 0 else 1 - float((exported - own).norm()) / effect


def _total(tokens: Any, labels: Any) -> float:
    """What `log_likelihoods` says of a probe without the adapter."""
    return float(sum(tokens["base"])) if tokens else float(max(labels["base"]))


def _original(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    return {"rank": config.rank, "alpha": config.alpha, "scaling": config.scaling}


def _write_launch(request: Request, facts: dict[str, Any], folder: Path) -> Launch:
    exported = Exported(
        name=request.name,
        base=_base_place(request),
        rank=facts.get("rank", 0),
        merged=request.merged,
        num_labels=request.num_labels,
        with_base=not request.adapter_only,
    )
    tokenizer = None
    if request.engine.name == "ollama" and request.base is not None:
        tokenizer = load_tokenizer(request.base)
    launch = plan_launch(request.engine, exported, tokenizer)
    for name, text in launch.files.items():
        write_text(folder / name, text)
    if launch.commands:
        write_text(folder / "serve.sh", launch.script)
        (folder / "serve.sh").chmod(0o755)
    write_text(folder / "README.txt", _readme(request, launch, facts))
    return launch


def _base_place(request: Request) -> str:
    """What an engine can load the base by: a hub id as it is, everything else as a folder."""
    if request.base is None:
        return "YOUR-BASE"
    if request.base in ENTRIES or Path(request.base).expanduser().is_dir():
        return str(model_folder(request.base).resolve())
    return request.base


def _readme(request: Request, launch: Launch, facts: dict[str, Any]) -> str:
    what = "A merged model" if request.merged else "An adapter"
    lines = [f"{what} for {request.engine.name}, exported by loralab.", ""]
    lines += [f"- {note}" for note in (*facts["notes"], *launch.notes)]
    if launch.commands:
        lines += ["", "Start it (serve.sh does it from this folder):", ""]
        lines += [f"    {line}" for line in launch.lines]
    if facts.get("probes") and launch.url:
        lines += [
            "",
            "Check that the server applies it:",
            "",
            f"    loralab probe {launch.url} --probes {PROBES} --model {launch.model}",
        ]
    return "\n".join([*lines, ""])
