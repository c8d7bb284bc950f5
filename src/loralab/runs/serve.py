"""`loralab serve`: a base with a folder of adapters, or a finished run, over HTTP."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from loralab.adapters import Adapter, label_names, outline_adapter
from loralab.errors import AdapterError, ConfigError, RunError
from loralab.events import Listener, Note, Phase, ignore
from loralab.models import Dtype, Pooling, load_model, load_tokenizer, model_folder
from loralab.runs.folder import HEAD_FILE, Run, open_run
from loralab.runs.workbench import base_model
from loralab.serving.fast import Precision
from loralab.serving.heads import is_classifier
from loralab.serving.http import (
    Keys,
    Service,
    check_bind,
    create_app,
    listen,
    read_keys,
    run,
)
from loralab.serving.opening import ServeSettings, open_service
from loralab.serving.store import Registry, is_name


@dataclass(frozen=True)
class Serving:
    """What `loralab serve` is told.

    source: a finished run; else `base` names a model, and `adapters` their folder.
    """

    source: Path | None = None
    base: str | None = None
    adapters: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    num_slots: int = 8
    max_batch_size: int = 32
    max_tokens: int | None = None
    dtype: Dtype = "auto"
    weights: Precision = "base"
    require_probes: bool = False


@dataclass(frozen=True)
class _Served:
    """A model to be served, and its adapters."""

    model: PreTrainedModel
    tokenizer_of: str
    name: str
    adapters: Path | None
    aliases: dict[str, str]
    labels: tuple[str, ...] = ()


def serve(
    serving: Serving,
    *,
    listen_to: Listener = ignore,
    on_ready: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> None:
    """Serves until SIGTERM or Ctrl-C. `on_ready` gets the URL and the models, once it answers.

    Raises `ConfigError` for a server that others could use without a key, and for keys that cannot
    be read; `RunError`, `ModelError`, `AdapterError` for what cannot be served.
    """
    keys = Keys() if serving.keys is None else read_keys(serving.keys)
    check_bind(serving.host, keys)
    bound = listen(serving.host, serving.port)
    try:
        with opened(serving, keys, listen_to) as service:
            port = bound.getsockname()[1]
            host = f"[{serving.host}]" if ":" in serving.host else serving.host
            facts = {
                "url": f"http://{host}:{port}",
                "base": service.base,
                "fingerprint": service.fingerprint,
                "models": [service.base, *service.store.names()],
                "weights": serving.weights,
                "max_tokens": service.max_tokens,
                "slots": serving.num_slots,
                "keys": bool(keys.callers),
            }
            app = create_app(service, hosts=("localhost", "127.0.0.1", "::1", serving.host))
            run(app, bound, lambda: on_ready(facts))
    finally:
        bound.close()


@contextmanager
def opened(serving: Serving, keys: Keys, listen_to: Listener = ignore) -> Iterator[Service]:
    """The service without HTTP, running until the `with` ends."""
    listen_to(Phase("loading the base", None, "files"))
    served = _of_run(serving) if serving.source is not None else _of_base(serving)
    tokenizer = load_tokenizer(served.tokenizer_of)
    settings = ServeSettings(
        base=served.name,
        num_slots=serving.num_slots,
        max_batch_size=serving.max_batch_size,
        max_tokens=serving.max_tokens,
        weights=serving.weights,
        require_probes=serving.require_probes,
        labels=served.labels,
        keys=keys,
    )
    listen_to(Note(f"{served.name} in {served.model.dtype}".replace("torch.", "")))
    if served.aliases:
        listen_to(Phase("proving that the adapter is applied", None, "probes"))
    with open_service(
        served.model, tokenizer, served.adapters, settings, aliases=served.aliases
    ) as service:
        yield service


def _of_base(serving: Serving) -> _Served:
    if serving.base is None:
        raise ConfigError(
            "neither a run nor a base to serve",
            "give a finished run, or `--base smollm2 --adapters DIR`.",
        )
    name = Path(serving.base).name or serving.base
    registry = None if serving.adapters is None else Registry(serving.adapters)
    if _writes_text(serving.base) and not _are_classifiers(registry):
        model = load_model(serving.base, task="causal", dtype=serving.dtype)
        return _Served(model, serving.base, name, serving.adapters, {})
    model = load_model(
        serving.base,
        task="classification",
        num_labels=_num_labels(serving.base),
        pooling=_pooling(registry),
        dtype=serving.dtype,
    )
    labels = label_names(model.config)
    return _Served(model, serving.base, name, serving.adapters, {}, labels)


def _of_run(serving: Serving) -> _Served:
    """A run's base with its adapter, or the model that it trained."""
    if serving.base is not None or serving.adapters is not None:
        raise ConfigError(
            "a run brings its own base and adapter", "give either a run, or --base and --adapters."
        )
    run = open_run(cast(Path, serving.source))
    config, artifact = run.config, run.artifact
    if serving.dtype != "auto":
        config = config.replace(model__dtype=serving.dtype)
    labels = tuple(run.manifest.get("label_names") or ())
    base = Path(config.model.name).name
    if artifact.name == "model":
        config = config.replace(model__name=str(artifact))
        model = cast(PreTrainedModel, base_model(config))
        return _Served(model, str(artifact), run.folder.resolve().name, None, {}, labels)
    model = cast(PreTrainedModel, base_model(config))
    if artifact.name == "head":
        model.load_state_dict(load_file(artifact / HEAD_FILE), strict=False)
        model.__dict__.pop("_loralab_fresh_head", None)
        return _Served(model, config.model.name, run.folder.resolve().name, None, {}, labels)
    return _Served(model, config.model.name, base, run.folder, _alias(run, base), labels)


def _alias(run: Run, base: str) -> dict[str, str]:
    """The run's adapter is served under the run's name."""
    name = run.folder.resolve().name
    if not is_name(name) or name == base:
        name = "adapter"
    if not (run.folder / "adapter").is_dir():
        raise RunError(f"{run.folder} has no adapter", "train it again.")
    return {name: "adapter"}


def _writes_text(base: str) -> bool:
    """Whether the model's own files call it a causal language model, or say nothing of it."""
    file = model_folder(base) / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = told.get("architectures") or ["ForCausalLM"]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _num_labels(base: str) -> int:
    """The classes of the model's own head, where its files hold one; else it is never asked."""
    config: Any = AutoConfig.from_pretrained(model_folder(base))
    return config.num_labels


def _outlines(registry: Registry | None) -> Iterator[Adapter]:
    """The adapters without their numbers; what cannot be read is left out, the store says why."""
    for name in registry.names() if registry is not None else ():
        with suppress(AdapterError):
            yield outline_adapter(cast(Registry, registry).folder(name))


def _are_classifiers(registry: Registry | None) -> bool:
    """Whether there are adapters, and all of them are a classifier's."""
    kinds = map(is_classifier, _outlines(registry))
    return next(kinds, False) and all(kinds)


def _pooling(registry: Registry | None) -> Pooling:
    """How the first adapter that says so was trained to pool; the others must agree with it."""
    told = (outline.pooling for outline in _outlines(registry))
    return cast(Pooling, next((each for each in told if each in get_args(Pooling)), "native"))
