"""The running requests: their slots, what each step computes, and what comes of it."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loralab.errors import CapacityError, LoralabError
from loralab.serving import jobs as work
from loralab.serving.answer import Answer, Ticket
from loralab.serving.faults import as_loralab_error
from loralab.serving.jobs import Job
from loralab.serving.merged import MergedMode
from loralab.serving.prefixes import Slots
from loralab.serving.requests import Entry, Request
from loralab.serving.runner import Chunk, Runner
from loralab.serving.sampling import choose_tokens

logger = logging.getLogger("loralab")

Charge = Callable[[str, int, int], None]
"""(tenant, tokens of prompts, tokens of answers) that a tenant was given."""

COUNTS = (
    "steps",
    "prompt_tokens",
    "cached_tokens",
    "prefix_hits",
    "generated_tokens",
    "switches",
)


class Batch:
    """All answers that are being written or whose prompts are being read.

    A step is one call of the runner: the next token of each answer, and at most `prefill_tokens` of
    prompts, so that long prompts do not hold up the answers. The engine's thread alone uses it.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefill_tokens: int,
        spare_slots: int,
        end_ids: frozenset[int],
        merging: MergedMode | None,
        charge: Charge,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.prefill_tokens, self.end_ids = prefill_tokens, end_ids
        self.spare_slots = spare_slots
        self.merging = merging
        self.charge = charge
        self.answers: list[Answer] = []
        self.slots = Slots(runner.num_slots)
        self.counts: Counter[str] = Counter()

    def may_begin(self, ticket: Ticket) -> bool:
        """False where another request is about to hold a long beginning of its prompt, and where
        only spare slots are free while its tenant has answers in work: those are for newcomers, who
        would wait for the end of somebody's answer otherwise."""
        request = ticket.request
        if self.slots.num_free <= self.spare_slots and any(
            answer.ticket.request.tenant == request.tenant for answer in self.answers
        ):
            return False
        return not self.slots.should_wait(request.prompt_ids, self._identity(request))

    def begin(self, ticket: Ticket) -> bool:
        """Gives a request a slot; False where none is free."""
        request = ticket.request
        start = self.slots.take(request.prompt_ids, self._identity(request))
        if start is None:
            return False
        if start.copied_from is not None:
            self.runner.copy_prefix(start.copied_from.number, start.slot.number, start.num_reused)
        self.counts["prefix_hits"] += start.num_reused > 0
        self.counts["cached_tokens"] += start.num_reused
        self.counts["prompt_tokens"] += len(request.prompt_ids)
        answer = Answer.begin(
            ticket,
            start,
            self.tokenizer,
            max_tokens=self.runner.max_tokens,
            end_ids=self.end_ids,
        )
        self.answers.append(answer)
        return True

    def step(self) -> bool:
        """Takes every answer one token further; False where none is running."""
        if not self.answers:
            return False
        alone = self._settle_merging()
        started = time.perf_counter()
        self._compute(self._plan())
        if self.merging is not None and self.merging.name is None:
            self.merging.policy.ran(alone, time.perf_counter() - started)
        self.counts["steps"] += 1
        return True

    def score(self, job: Job) -> None:
        """What the model thinks of given tokens; needs a free slot for the moment."""
        start = self.slots.take(job.token_ids, "")
        if start is None:
            job.future.set_exception(CapacityError("no slot is free", "try again."))
            return
        if self.merging is not None and job.entry != self.merging.name:
            self.set_apart()
        entry = self._entry(job.entry)
        work.score(self.runner, job, start.slot.number, entry, self.prefill_tokens)
        self.slots.release(start.slot, sound=False)

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and which adapter is merged."""
        merged = None if self.merging is None else self.merging.name
        return {"merged": merged, **{name: self.counts[name] for name in COUNTS}}

    def drop(self, ticket: Ticket) -> None:
        """Frees the slot of a request that is no longer wanted, if it runs."""
        for answer in self.answers:
            if answer.ticket is ticket:
                self._release(answer)
                return

    def fail(self, error: LoralabError) -> None:
        """Ends everything that runs with an error."""
        for answer in list(self.answers):
            self._release(answer, sound=False)
            answer.ticket.end("error", error)

    def set_apart(self) -> None:
        """The base's own weights again; those that run go on with the adapter beside them."""
        if self.merging is not None:
            self.merging.restore(self._weights_changed)

    def _plan(self) -> list[tuple[Answer, Chunk]]:
        """One token of each answer being written; of prompts as much as the budget holds."""
        budget, planned = self.prefill_tokens, []
        for answer in self.answers:
            num_tokens = answer.num_left
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            if num_tokens:
                entry = self._entry(answer.ticket.request.entry)
                planned.append((answer, answer.chunk(num_tokens, entry)))
        return planned

    def _compute(self, planned: list[tuple[Answer, Chunk]]) -> None:
        """Runs the chunks; where that fails, each alone, so that one request's fault is its own."""
        try:
            logits = self.runner.forward([chunk for _, chunk in planned])
        except Exception as error:
            if len(planned) > 1:
                for pair in planned:
                    self._compute([pair])
                return
            logger.warning("a request failed: %s", error, exc_info=True)
            answer = planned[0][0]
            self._release(answer, sound=False)
            answer.ticket.end("error", as_loralab_error(error))
            return
        self._take(planned, logits)

    def _take(
        self, planned: list[tuple[Answer, Chunk]], logits: Float[Tensor, "chunks vocab"]
    ) -> None:
        """Notes what was computed, and chooses a next token where a prompt or token is complete."""
        rows = []
        for row, (answer, chunk) in enumerate(planned):
            read = min(answer.num_prompt_left, len(chunk.token_ids))
            answer.hold(chunk)
            complete = answer.num_left == 0
            self.charge(answer.ticket.request.tenant, read, int(complete))
            if complete:
                rows.append(row)
        if len(rows) < len(planned):
            logits = logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]
        answers = [planned[row][0] for row in rows]
        if not answers:
            return
        chosen = choose_tokens(logits, [answer.sampler for answer in answers])
        for answer, token in zip(answers, chosen, strict=True):
            if token is None:
                self._release(answer, sound=False)
                answer.ticket.end("error", work.not_numbers())
                continue
            self.counts["generated_tokens"] += 1
            answer.add(token)
            if answer.ticket.finished:
                self._release(answer)

    def _release(self, answer: Answer, *, sound: bool = True) -> None:
        self.answers.remove(answer)
        self.slots.release(answer.start.slot, sound=sound)

    def _entry(self, entry: Entry) -> Entry:
        """What the runner is told: an adapter that is in the weights already is the base."""
        return None if self.merging is not None and entry == self.merging.name else entry

    def _identity(self, request: Request) -> str:
        """Merged weights round otherwise, so their keys and values are kept apart."""
        name = None if self.merging is None else self.merging.name
        is_merged = name is not None and request.entry == name
        return f"{request.identity} merged" if is_merged else request.identity

    def _settle_merging(self) -> str | None:
        """Merges or restores as those that run demand; gives the adapter that is alone, if any."""
        merging = self.merging
        if merging is None:
            return None
        entries = [answer.ticket.request.entry for answer in self.answers]
        first = entries[0]
        alone = first if isinstance(first, str) and all(e == first for e in entries) else None
        if merging.name is not None and merging.name != alone:
            self.set_apart()
        elif alone is not None and merging.wanted(alone):
            merging.merge(alone, self._weights_changed)
        return alone

    def _weights_changed(self) -> None:
        self.counts["switches"] += 1
        for answer in self.answers:
            slot = answer.start.slot
            # what was computed with both is not for anybody else to go on from
            slot.identity = None if slot.tokens else self._identity(answer.ticket.request)
        self.runner.adapters_changed()
