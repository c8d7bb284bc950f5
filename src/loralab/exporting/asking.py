"""Asking a server the probes, by the most telling way that it offers.

1. `echo` with `logprobs` (OpenAI's completions): the log-likelihood of every token of the text.
2. `prompt_logprobs` (vLLM): the same, by token numbers.
3. `logprobs` of the first generated token: its likeliest tokens.
4. The greedy continuation as text.
Classifiers are asked for the probabilities of their labels (`/v1/classify`, `/classify`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from loralab.errors import ServerError, nearest
from loralab.exporting.probe_file import ProbeFile, ServerProbe
from loralab.exporting.remote import Answer, Server

COMPLETIONS = "/v1/completions"
NUM_TOP = 5  # of OpenAI's limit for completions
LEAST = -50.0  # nats: log-likelihoods below are cut, as some servers write -9999 for -inf


@dataclass(frozen=True)
class Reading:
    """What a server said.

    way: what was asked, for people. kind: which of a probe's answers it is compared with.
    values: per probe the place of each answer among the expected ones, and its log-likelihood.
    texts: continuations, where there are no log-likelihoods.
    """

    way: str
    kind: Literal["tokens", "next", "texts"]
    values: tuple[Mapping[int, float], ...] = ()
    texts: tuple[str, ...] = ()

    def found(self) -> Float[np.ndarray, "answers"]:
        """All answers as one vector."""
        numbers = [value for row in self.values for value in row.values()]
        return np.maximum(np.array(numbers, dtype=float), LEAST)

    def expected(self, probes: ProbeFile, variant: str) -> Float[np.ndarray, "answers"]:
        """What the variant would have said to the same."""
        numbers = [
            getattr(probe, self.kind)[variant][place]
            for probe, row in zip(probes.probes, self.values, strict=True)
            for place in row
        ]
        return np.maximum(np.array(numbers, dtype=float), LEAST)

    def common(self, other: "Reading") -> tuple["Reading", "Reading"]:
        """Both, with only those answers that both have."""
        pairs = list(zip(self.values, other.values, strict=True))
        mine = tuple({p: v for p, v in one.items() if p in two} for one, two in pairs)
        theirs = tuple({p: two[p] for p in one if p in two} for one, two in pairs)
        return replace(self, values=mine), replace(other, values=theirs)


def read_server(server: Server, model: str, probes: ProbeFile, title: str | None = None) -> Reading:
    """The server's answers, by the first way that works (or by the one of that title).

    Raises `ServerError` where none does, with what the server said to the last.
    """
    ways = CLASSIFYING if probes.task == "classification" else COMPLETING
    said = Answer(0, "nothing")
    for way in ways:
        if title is not None and way.title != title:
            continue
        found, said = _ask_all(server, model, probes, way.ask)
        if found is not None and way.kind == "texts":
            return Reading(way.title, way.kind, texts=tuple(found))
        if found is not None:
            return Reading(way.title, way.kind, values=tuple(found))
    raise ServerError(
        f"{server.url} answers no probe as {model!r} ({said.status}: {said.message})",
        "check that it serves completions (or classification) of this model, and its log.",
    )


Ask = Callable[[Server, str, ServerProbe], tuple[Any, Answer]]
Kind = Literal["tokens", "next", "texts"]


@dataclass(frozen=True)
class Way:
    """One way of asking: its name, which of a probe's answers it gives, and the request."""

    title: str
    kind: Kind
    ask: Ask


def _ask_all(
    server: Server, model: str, probes: ProbeFile, ask: Ask
) -> tuple[list[Any] | None, Answer]:
    """The answers to all probes, or None where the server cannot tell any of them this way."""
    found, answer = [], Answer(0, "nothing")
    for probe in probes.probes:
        told, answer = ask(server, model, probe)
        if told is None:
            return None, answer
        found.append(told)
    return (found if any(found) else None), answer


def _complete(
    server: Server, model: str, probe: ServerProbe, **more: Any
) -> tuple[dict[str, Any], Answer]:
    """The first choice of a completion ({} where there is none): by token numbers, else by text."""
    body = {"model": model, "max_tokens": 1, "temperature": 0, **more}
    answer = Answer(0, "nothing")
    for prompt in (list(probe.token_ids), probe.text):
        answer = server.post(COMPLETIONS, {**body, "prompt": prompt})
        choices = answer.body.get("choices") if isinstance(answer.body, dict) else None
        if answer.good and isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return choices[0], answer
        if answer.status not in (400, 415, 422, 500):
            break
    return {}, answer


def _echo(server: Server, model: str, probe: ServerProbe) -> tuple[Any, Answer]:
    choice, answer = _complete(server, model, probe, echo=True, logprobs=1)
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    expected = len(probe.token_ids)
    if not isinstance(values, list) or len(values) not in (expected, expected + 1):
        return None, answer  # no echo, or a text that was cut into other tokens
    return _numbered(values[1:expected]), answer


def _prompt_logprobs(server: Server, model: str, probe: ServerProbe) -> tuple[Any, Answer]:
    choice, answer = _complete(server, model, probe, prompt_logprobs=0)
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(probe.token_ids):
        return None, answer
    values = []
    for number, row in zip(probe.token_ids[1:], rows[1:], strict=True):
        entry = row.get(str(number)) if isinstance(row, dict) else None
        values.append(entry.get("logprob") if isinstance(entry, dict) else None)
    return _numbered(values), answer


def _next(server: Server, model: str, probe: ServerProbe) -> tuple[Any, Answer]:
    choice, answer = _complete(server, model, probe, logprobs=NUM_TOP)
    by_number = {number: place for place, (number, _) in enumerate(probe.choices)}
    texts = [text for _, text in probe.choices]
    by_text = {text: place for place, text in enumerate(texts) if _is_one(text, texts)}
    found: dict[int, float] = {}
    for number, text, value in _likeliest(choice.get("logprobs")):
        place = by_number.get(number) if number is not None else by_text.get(text)
        if place is not None and _is_number(value):
            found[place] = float(value)
    # none of ours among the likeliest, or (llama.cpp) a token that is half a character: {}
    return (found if choice else None), answer


def _is_one(text: str, texts: list[str]) -> bool:
    """Whether a text means one token: parts of characters all look alike."""
    return texts.count(text) == 1 and "\ufffd" not in text


def _likeliest(logprobs: Any) -> list[tuple[int | None, str, Any]]:
    """(number, text, log-likelihood) of the likeliest first tokens, in either of two shapes."""
    if not isinstance(logprobs, dict):
        return []
    content, top = logprobs.get("content"), logprobs.get("top_logprobs")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        rows = content[0].get("top_logprobs") or []  # chat's shape, as llama.cpp answers
        return [
            (_number(row.get("id")), str(row.get("token")), row.get("logprob"))
            for row in rows
            if isinstance(row, dict)
        ]
    if isinstance(top, list) and top and isinstance(top[0], dict):
        return [(None, text, value) for text, value in top[0].items()]
    return []


def _text(server: Server, model: str, probe: ServerProbe) -> tuple[Any, Answer]:
    choice, answer = _complete(server, model, probe, max_tokens=8)
    text = choice.get("text")
    return (text if isinstance(text, str) else None), answer


def _labels(server: Server, model: str, probe: ServerProbe) -> tuple[Any, Answer]:
    answer = Answer(0, "nothing")
    for path in ("/v1/classify", "/classify"):
        answer = server.post(path, {"model": model, "input": probe.text})
        rows = answer.body.get("data") if isinstance(answer.body, dict) else None
        row = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        shares = row.get("probs")
        if isinstance(shares, list) and len(shares) == len(probe.choices):
            values = [math.log(max(s, 1e-30)) if _is_number(s) else None for s in shares]
            return _numbered(values), answer
        if answer.status != 404:
            break
    return None, answer


COMPLETING = (
    Way("every token of the texts (echo)", "tokens", _echo),
    Way("every token of the texts (prompt_logprobs)", "tokens", _prompt_logprobs),
    Way("the likeliest next tokens (logprobs)", "next", _next),
    Way("greedy continuations (no log-likelihoods)", "texts", _text),
)
CLASSIFYING = (Way("the probabilities of the labels (classify)", "next", _labels),)


def _numbered(values: list[Any]) -> dict[int, float] | None:
    """Place -> value; None where one is missing."""
    if not all(map(_is_number, values)):
        return None
    return {place: float(value) for place, value in enumerate(values)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Served:
    """The models that a server lists: name -> the base it belongs to (None for a base)."""

    models: Mapping[str, str | None]
    owner: str = ""

    def base_of(self, model: str) -> str | None:
        """The name under which the same server serves the model's base, where it says so."""
        parent = self.models.get(model)
        return parent if parent in self.models and parent != model else None


def served_models(server: Server) -> Served:
    """What `/v1/models` lists; nothing where the server has no such list."""
    answer = server.get("/v1/models")
    rows = answer.body.get("data") if isinstance(answer.body, dict) else None
    rows = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    found = {str(row["id"]): row.get("parent") for row in rows if "id" in row}
    owner = str(rows[0].get("owned_by", "")) if rows else ""
    return Served({k: v if isinstance(v, str) else None for k, v in found.items()}, owner)


def choose_model(served: Served, name: str | None, exported: str) -> str:
    """The model to ask: the named one, the exported adapter's name, or the only one there is.

    Raises `ServerError` that lists the models where that is not clear.
    """
    known = served.models
    if name is not None:
        # served without being listed: SGLang's "base:adapter", this project's mixes "adapter=0.5"
        if not known or name in known or ":" in name or "=" in name:
            return name
        raise ServerError(f"the server has no model {name!r}", f"{nearest(name, known)}")
    if exported in known:
        return exported
    if len(known) == 1:
        return next(iter(known))
    listed = ", ".join(known) or "none"
    raise ServerError(
        f"the server lists these models: {listed}; {exported!r} is none of them",
        "name the one that should have the adapter: --model NAME.",
    )
