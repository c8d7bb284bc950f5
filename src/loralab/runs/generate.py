"""`loralab generate`: try a trained model on one prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import CONFIG_FILE, read_adapter, use
from loralab.config import DataSection, Task
from loralab.data import Example, encode
from loralab.errors import ConfigError, DataError, RunError
from loralab.events import Listener, Phase, ignore
from loralab.models import load_model, load_tokenizer
from loralab.runs.evaluate import adapted, trained_model
from loralab.runs.folder import MANIFEST, Run, open_run
from loralab.runs.subject import task_of
from loralab.training import ADAPTER_NAME, choose_device, predict


@dataclass(frozen=True)
class _Trained:
    """What is asked: a model under its adapter, and how prompts are put to it."""

    source: str
    base: str
    model: nn.Module
    route: str | None
    task: Task
    label_names: tuple[str, ...]
    max_tokens: int  # of a text to classify
    is_chat: bool


def generate(
    source: Run | str | Path,
    prompt: str,
    *,
    base: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Continue `prompt` with a language model, or classify it with a classifier.

    source: a finished run, or the folder of an adapter; `base` is its base where its file names
    none, or another. Returns a dict with `text`, and `tokens` or `probabilities` by label name. A
    base with a chat template is prompted through it when the run was trained on messages.

    Raises `RunError` where the source is neither, or the run not finished, `AdapterError` where
    an adapter does not fit, `ConfigError` where its base is not known, `DataError` for an empty
    prompt.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty", "give some text.")
    listen(Phase("loading the model", None, "files"))
    trained = _trained(source if isinstance(source, Run) else Path(source), base)
    if trained.task == "classification":
        return _classify(trained, prompt)
    return _continue(trained, prompt, max_tokens, temperature, seed)


def _trained(source: Run | Path, base: str | None) -> _Trained:
    if isinstance(source, Run):
        return _of_run(source, base)
    if (source / CONFIG_FILE).is_file():
        return _of_adapter(source, base)
    if (source / MANIFEST).is_file():
        return _of_run(open_run(source), base)
    if not source.is_dir():
        raise RunError(f"{source} is no folder", f"give {_GIVE}.")
    raise RunError(
        f"{source} is neither a run (it has no {MANIFEST}) nor an adapter (no {CONFIG_FILE})",
        f"give {_GIVE}.{_inside(source)}",
    )


_GIVE = (
    "the folder that `loralab train --output` wrote, or that of an adapter in PEFT's format,"
    " with --base where its file names none"
)


def _inside(folder: Path) -> str:
    """The folders in `folder` that can be given, in words."""
    found = sorted(
        str(file.parent) for name in (MANIFEST, CONFIG_FILE) for file in folder.glob(f"*/{name}")
    )
    return f" Inside it: {', '.join(found[:5])}." if found else ""


def _of_run(run: Run, base: str | None) -> _Trained:
    if base is not None:
        raise ConfigError(
            f"{run.folder} is a run, which has its base already",
            f"leave out --base, or give {run.folder}/adapter.",
        )
    model, route = trained_model(run)
    return _Trained(
        source=str(run.folder),
        base=run.config.model.name,
        model=model,
        route=route,
        task=run.config.model.text_task,
        label_names=tuple(run.manifest["label_names"]),
        max_tokens=run.config.data.max_tokens,
        is_chat=run.manifest["data"].get("form") == "messages",
    )


def _of_adapter(folder: Path, base: str | None) -> _Trained:
    adapter = read_adapter(folder)
    named = base or adapter.facts.get("base_model")
    if named is None:
        raise ConfigError(
            f"the adapter's file in {folder} does not name its base",
            "give it, for example --base smollm2.",
        )
    told = task_of(adapter)
    return _Trained(
        source=str(folder),
        base=named,
        model=adapted(load_model(named, **told), adapter, choose_device("auto")),
        route=ADAPTER_NAME,
        task=told["task"],
        label_names=tuple(str(label) for label in range(told.get("num_labels", 0))),
        max_tokens=DataSection.model_fields["max_tokens"].default,
        is_chat=False,
    )


def _classify(trained: _Trained, prompt: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(trained.base)
    example = Example(id="prompt", group="prompt", text=prompt, label=0)
    rows = encode([example], tokenizer, task="classification", max_tokens=trained.max_tokens)
    [answer] = predict(trained.model, rows, task="classification", route=trained.route)
    probabilities = dict(zip(trained.label_names, answer.probabilities or (), strict=True))
    best = max(probabilities, key=lambda name: probabilities[name])
    listed = ", ".join(f"{name} {share:.3f}" for name, share in probabilities.items())
    return {
        "run": trained.source,
        "prompt": prompt,
        "label": best,
        "probabilities": probabilities,
        "text": f"{best} ({listed})",
    }


def _continue(
    trained: _Trained, prompt: str, max_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    tokenizer = load_tokenizer(trained.base)
    text = prompt
    if trained.is_chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    model: Any = trained.model  # every causal model generates
    inputs = tokenizer(text, return_tensors="pt").to(next(model.parameters()).device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    with torch.random.fork_rng(), torch.inference_mode(), use(trained.model, trained.route):
        torch.manual_seed(seed)
        produced = model.generate(
            **inputs, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    new = produced[0, inputs["input_ids"].shape[1] :]
    return {
        "run": trained.source,
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
    }
