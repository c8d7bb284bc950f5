"""`loralab probe`: does a server that somebody else runs apply the adapter that was exported?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab.errors import ServerError
from loralab.events import Listener, Note, Phase, ignore
from loralab.exporting import (
    TOLERANCE_NATS,
    ProbeFile,
    Reading,
    Server,
    Unreachable,
    Verdict,
    choose_model,
    connect,
    judge,
    judge_texts,
    read_probe_file,
    read_server,
    served_models,
)


def probe(
    url: str,
    probes: str | Path,
    *,
    model: str | None = None,
    base_model: str | None = None,
    key_variable: str | None = None,
    timeout_seconds: float | int = 60.0,
    tolerance_nats: float | int = TOLERANCE_NATS,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """Ask an OpenAI-compatible server the probes of an export, and judge its answers.

    model: the name to ask for; None takes the exported name, or the only one that is served.
    base_model: the base's name on the same server, asked too (None: as `/v1/models` tells).

    Returns the verdict ("applied", "not applied", "wrong scale", "something else", "undecided",
    "unreachable") with its evidence. Raises `ConfigError` for a damaged probe file and a bad
    address, `ServerError` for a server that answers no probe.
    """
    expected = read_probe_file(probes)
    server = connect(url, key_variable, timeout_seconds)
    try:
        return _probe(server, expected, model, base_model, float(tolerance_nats), listen)
    except Unreachable as error:
        return {
            "verdict": "unreachable",
            "explanation": str(error),
            "url": server.url,
            "model": model,
            "checked": None,
        }


def _probe(
    server: Server,
    expected: ProbeFile,
    model: str | None,
    base_model: str | None,
    tolerance_nats: float,
    listen: Listener,
) -> dict[str, Any]:
    served = served_models(server)
    asked = choose_model(served, model, expected.name)
    control = base_model or served.base_of(asked)
    listen(Phase(f"asking {asked}"))
    reading = read_server(server, asked, expected)
    base = None
    if control is not None and control != asked and reading.kind != "texts":
        listen(Phase(f"asking {control}, the base"))
        base = _base_reading(server, control, expected, reading, listen)
    verdict = _judge(reading, base, expected, tolerance_nats)
    hint = _hint(verdict, served.owner, asked, expected)
    return {
        "verdict": verdict.outcome,
        "explanation": verdict.explanation + hint,
        "url": server.url,
        "model": asked,
        "base_model": None if base is None else control,
        "checked": reading.way,
        "num_probes": len(expected.probes),
        "num_answers": len(reading.texts) or len(reading.found()),
        **{k: v for k, v in asdict(verdict).items() if k not in ("outcome", "explanation")},
    }


def _base_reading(
    server: Server, control: str, expected: ProbeFile, reading: Reading, listen: Listener
) -> Reading | None:
    """The base's answers to the same questions; None where it does not give them."""
    try:
        found = read_server(server, control, expected, reading.way)
    except ServerError as error:
        listen(Note(f"the base could not be asked: {error.cause}", warning=True))
        return None
    return found


def _judge(
    reading: Reading, base: Reading | None, expected: ProbeFile, tolerance_nats: float
) -> Verdict:
    if reading.kind == "texts":
        return judge_texts(list(reading.texts), [row.continuation for row in expected.probes])
    if base is not None:
        reading, base = reading.common(base)
    return judge(
        reading.found(),
        {variant: reading.expected(expected, variant) for variant in expected.variants},
        expected.scales,
        base=None if base is None else base.found(),
        original=expected.original,
        tolerance_nats=tolerance_nats,
    )


def _hint(verdict: Verdict, owner: str, asked: str, expected: ProbeFile) -> str:
    """What is known to cause this on that server."""
    if verdict.outcome == "not applied" and "sglang" in owner and ":" not in asked:
        return f"; SGLang applies an adapter only when asked for as --model base:{expected.name}"
    if verdict.outcome == "not applied" and "vllm" in owner:
        return "; vLLM leaves out pairs whose modules it does not find, see its log at loading"
    return ""
