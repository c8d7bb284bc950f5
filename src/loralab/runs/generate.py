"""`loralab generate`: try a trained model on one prompt."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import use
from loralab.data import Example, encode
from loralab.errors import DataError
from loralab.events import Listener, Phase, ignore
from loralab.models import load_tokenizer
from loralab.runs.evaluate import trained_model
from loralab.runs.folder import Run, open_run
from loralab.training import predict


def generate(
    run: Run | str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Continue `prompt` with a finished run's language model, or classify it with its classifier.

    Returns a dict with `text`, and `tokens` or `probabilities` by label name. A base with a chat
    template is prompted through it when the run was trained on messages.
    Raises `RunError` where the run is not finished, `DataError` for an empty prompt.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if not prompt.strip():
        raise DataError("the prompt is empty", "give some text.")
    listen(Phase("loading the model", None, "files"))
    model, route = trained_model(run)
    if run.config.model.task == "classification":
        return _classify(run, model, route, prompt)
    return _continue(run, model, route, prompt, max_tokens, temperature, seed)


def _classify(run: Run, model: nn.Module, route: str | None, prompt: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(run.config.model.name)
    example = Example(id="prompt", group="prompt", text=prompt, label=0)
    rows = encode(
        [example], tokenizer, task="classification", max_tokens=run.config.data.max_tokens
    )
    [answer] = predict(model, rows, task="classification", route=route)
    names = run.manifest["label_names"]
    probabilities = dict(zip(names, answer.probabilities or (), strict=True))
    best = max(probabilities, key=lambda name: probabilities[name])
    listed = ", ".join(f"{name} {share:.3f}" for name, share in probabilities.items())
    return {
        "run": str(run.folder),
        "prompt": prompt,
        "label": best,
        "probabilities": probabilities,
        "text": f"{best} ({listed})",
    }


def _continue(
    run: Run,
    model: nn.Module,
    route: str | None,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(run.config.model.name)
    text = prompt
    if run.manifest["data"].get("form") == "messages" and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    device = next(model.parameters()).device
    inputs = tokenizer(text, return_tensors="pt").to(device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    with torch.random.fork_rng(), torch.inference_mode(), use(model, route):
        torch.manual_seed(seed)
        produced = model.generate(  # type: ignore[operator]  (every causal model generates)
            **inputs, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    new = produced[0, inputs["input_ids"].shape[1] :]
    return {
        "run": str(run.folder),
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
    }
