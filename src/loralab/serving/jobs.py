"""Work that is no answer: classes, vectors, and log-likelihoods of given tokens."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loralab.errors import LoralabError, RequestError
from loralab.serving.faults import out_of_memory
from loralab.serving.requests import Entry
from loralab.serving.runner import Chunk, Encoder, Pooling, Runner
from loralab.serving.sampling import Chosen, judged

BATCH_TEXTS = 32
BATCH_TOKENS = 4096
"""Of one step, so that running answers wait no longer than for a long chunk of a prompt."""


@dataclass(eq=False)
class Job:
    """One text, and whoever waits for what comes of it.

    kind: "classify" | "embed" | "score". identity of its batch: jobs of one kind and pooling run
    together. num_best: of a score, alternatives beside each token.
    """

    kind: Literal["classify", "embed", "score"]
    token_ids: tuple[int, ...]
    entry: Entry
    tenant: str = ""
    pooling: Pooling = "mean"
    num_best: int = 0
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def alike(self) -> tuple[str, str]:
        return self.kind, self.pooling


def batch_of(jobs: Sequence[Job], first: Job) -> list[Job]:
    """The jobs that one forward of the encoder takes together with the first."""
    chosen, longest = [first], len(first.token_ids)
    for job in jobs:
        longest = max(longest, len(job.token_ids))
        if longest * (len(chosen) + 1) > BATCH_TOKENS or len(chosen) == BATCH_TEXTS:
            break
        if job.alike == first.alike and job is not first:
            chosen.append(job)
    return chosen


def encode(encoder: Encoder, jobs: Sequence[Job]) -> None:
    """Runs jobs that are alike in one batch; where that fails, each alone, to find whose fault."""
    texts, entries = [job.token_ids for job in jobs], [job.entry for job in jobs]
    try:
        if jobs[0].kind == "classify":
            results: Sequence[Any] = encoder.classify(texts, entries)
        else:
            results = list(encoder.embed(texts, entries, jobs[0].pooling))
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(out_of_memory(error) or error)
            return
        for job in jobs:
            encode(encoder, [job])
        return
    for job, result in zip(jobs, results, strict=True):
        job.future.set_result(result)


def score(runner: Runner, job: Job, slot: int, entry: Entry, chunk_tokens: int) -> None:
    """What the model thought of each given token; the first has no log-probability."""
    tokens = job.token_ids
    found = [Chosen(tokens[0])]
    try:
        for start in range(0, len(tokens), chunk_tokens):
            part = tokens[start : start + chunk_tokens]
            logits = runner.all_logits(Chunk(slot, part, start, entry))
            if not bool(torch.isfinite(logits).all()):
                raise not_numbers()
            following = tokens[start + 1 : start + 1 + len(part)]
            found += [
                judged(token, row, job.num_best)
                for token, row in zip(following, logits, strict=False)
            ]
    except Exception as error:
        job.future.set_exception(out_of_memory(error) or error)
        return
    job.future.set_result(found)


def not_numbers() -> LoralabError:
    return RequestError(
        "the model's answer to this request is not a number",
        "an adapter or a mix whose weights are far too large does this; try another one.",
    )
