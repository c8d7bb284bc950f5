"""What is asked of the engine, and what it gives back piece by piece."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loralab.errors import LoralabError, RequestError

Entry = str | Mapping[str, float | int] | None
"""Who answers: an adapter by the name it is hosted under, a mix {name: weight}, None the base."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 is greedy; 1 leaves the model's probabilities as they are.
    top_p: the smallest set of tokens whose probabilities reach this sum stays (1: all).
    top_k: that many best tokens stay (0: all).
    repetition_penalty: scores of tokens in the prompt or the answer are divided (positive) or
        multiplied (negative) by it, as transformers does (1: none).
    stop: texts that end the answer; they are no part of it.
    seed: the same seed gives the same answer whatever else is in the batch; None draws one.
    logprobs: how many best alternatives are reported beside each token; None reports nothing.
    ignore_eos: goes on after the model's end token, for measurements.
    """

    max_tokens: int = 16
    temperature: float | int = 1.0
    top_p: float | int = 1.0
    top_k: int = 0
    repetition_penalty: float | int = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises `RequestError` that lists every value out of range."""
        faults = [
            f"{name} is {getattr(self, name)!r}, not {wanted}"
            for name, fits, wanted in (
                ("max_tokens", self.max_tokens >= 1, "at least 1"),
                ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
                ("logprobs", (self.logprobs or 0) >= 0, "at least 0"),
                ("stop", all(self.stop), "texts of at least one character"),
            )
            if not fits
        ]
        if faults:
            raise RequestError("; ".join(faults), "give values inside these ranges.")


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    identity: what `entry` stands for, by content: "" for the base, else hashes (and weights).
        Cached keys and values are reused only where tokens and identity are equal.
    tenant: whose queue it waits in; tenants take turns.
    """

    prompt_ids: tuple[int, ...]
    entry: Entry = None
    identity: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""


@dataclass(frozen=True)
class Piece:
    """One generated token, or the end.

    token_id: None where the request ended without another token (cancelled, error).
    text: newly decoded text; "" while a character is incomplete or a stop text may be beginning.
        The texts of all pieces joined are the answer.
    logprob, top_logprobs: natural logarithms of the model's own probabilities, before temperature,
        penalty and filters; best alternatives first. Absent unless `Sampling.logprobs` is given.
    finish_reason: set on the last piece, and on no other.
    """

    token_id: int | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: LoralabError | None = None
