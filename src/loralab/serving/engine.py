"""The engine: requests come in from any thread, and are answered on one.

Continuous batching: every step takes all running requests one token further (`batch`), and requests
come and go between steps.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loralab.adapters import collector_paused
from loralab.errors import CapacityError, RequestError
from loralab.serving import jobs as work
from loralab.serving.answer import Deliver, Ticket
from loralab.serving.batch import Batch
from loralab.serving.faults import as_loralab_error
from loralab.serving.jobs import Job
from loralab.serving.merged import MergedMode
from loralab.serving.requests import Entry, Request
from loralab.serving.runner import Encoder, Pooling, Runner
from loralab.serving.scheduler import FairQueue
from loralab.serving.text import end_tokens

logger = logging.getLogger("loralab")
_Call = tuple[Callable[[], Any], "Future[Any]", bool, Collection[str] | None]


class Engine:
    """Answers requests on one thread of its own; everything public may be called from any thread.

    runner: the causal model; None where there is only an encoder.
    encoder: what classifies and embeds; None where requests for that are refused.
    max_waiting: places in the queue (`FairQueue` says how tenants share them).
    prefill_tokens: tokens of prompts read in one step, so that answers being written do not stall.
    spare_slots: so many of the runner's slots are for tenants that have no answer in work.
    eos_ids: tokens that end an answer (None: the tokenizer's; `end_tokens` knows the model's too).
    merging: merges an adapter that is alone for long into the weights; None never does.
    """

    def __init__(
        self,
        runner: Runner | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder: Encoder | None = None,
        max_waiting: int = 256,
        prefill_tokens: int = 256,
        spare_slots: int = 0,
        eos_ids: Iterable[int] | None = None,
        merging: MergedMode | None = None,
    ) -> None:
        self.runner, self.encoder = runner, encoder
        self.eos_ids = end_tokens(None, tokenizer) if eos_ids is None else frozenset(eos_ids)
        self._changed = threading.Condition(threading.RLock())  # of all that other threads touch
        self._requests: FairQueue[Ticket] = FairQueue(max_waiting)
        self._jobs: FairQueue[Job] = FairQueue(max_waiting)
        self._calls: deque[_Call] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._closing: str | None = None  # "drain" | "at once"
        self._thread: threading.Thread | None = None
        self._generated: Counter[str] = Counter()  # by tenant
        self._batch = None  # the engine's thread alone
        if runner is not None:
            self._batch = Batch(
                runner,
                tokenizer,
                prefill_tokens=prefill_tokens,
                spare_slots=spare_slots,
                end_ids=self.eos_ids,
                merging=merging,
                charge=self._charge,
            )

    # -- any thread --------------------------------------------------------------------------

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queues a request; `deliver` gets its pieces on the engine's thread and must be quick.

        Raises `RequestError` for a prompt that is empty, too long or has unknown tokens,
        `CapacityError` where the queue is full or the engine closes.
        """
        runner = self.runner
        if runner is None:
            raise RequestError("this model writes no text", "ask it for classes or embeddings.")
        _check(request.prompt_ids, runner.max_tokens - 1, runner.vocab_size)
        ticket = Ticket(request, deliver, self._wake_for)
        with self._changed:
            self._check_open()
            self._requests.put(request.tenant, ticket)
            self._changed.notify_all()
        return ticket

    def classify(
        self, prompt_ids: Sequence[int], entry: Entry = None, *, tenant: str = ""
    ) -> "Future[Tensor]":
        """fp32 logits (classes,) of one text, by the entry's own head."""
        return self._queue(Job("classify", tuple(prompt_ids), entry, tenant))

    def embed(
        self,
        prompt_ids: Sequence[int],
        entry: Entry = None,
        *,
        tenant: str = "",
        pooling: Pooling = "mean",
    ) -> "Future[Tensor]":
        """The fp32 vector (width,) of one text; not normalised."""
        return self._queue(Job("embed", tuple(prompt_ids), entry, tenant, pooling))

    def score(
        self,
        prompt_ids: Sequence[int],
        entry: Entry = None,
        *,
        tenant: str = "",
        num_best: int = 0,
    ) -> "Future[list[Any]]":
        """A `sampling.Chosen` for each given token: its log-probability after those before it."""
        return self._queue(Job("score", tuple(prompt_ids), entry, tenant, num_best=num_best))

    def call(
        self,
        function: Callable[[], Any],
        *,
        changes_adapters: bool = True,
        only: Collection[str] | None = None,
    ) -> "Future[Any]":
        """Runs a function on the engine's thread between steps, on a base that is not merged.

        changes_adapters: the runner is told afterwards; False: nothing was attached or detached,
            and the weights may be merged meanwhile.
        only: the adapters that it changes, where it changes no others.
        """
        future: Future[Any] = Future()
        with self._changed:
            self._check_open()
            self._calls.append((function, future, changes_adapters, only))
            self._changed.notify_all()
        return future

    def stats(self) -> dict[str, Any]:
        """Numbers of now (running, waiting, by tenant) and since the start (all others)."""
        with self._changed:
            waiting = Counter(self._requests.waiting()) + Counter(self._jobs.waiting())
            answers = tuple(self._batch.answers) if self._batch is not None else ()
            running = Counter(answer.ticket.request.tenant for answer in answers)
            tenants = sorted({*waiting, *running, *self._generated})
            return {
                "running": running.total(),
                "waiting": waiting.total(),
                "slots": self.runner.num_slots if self.runner is not None else 0,
                "tenants": {
                    name: {
                        "running": running[name],
                        "waiting": waiting[name],
                        "generated_tokens": self._generated[name],
                    }
                    for name in tenants
                },
                **(self._batch.stats() if self._batch is not None else {}),
            }

    def start(self) -> None:
        """Runs the engine on a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="loralab-engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        """Takes no more requests and waits for the end: of all answers, or (no drain) at once."""
        with self._changed:
            self._closing = "drain" if drain else "at once"
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # -- the engine's thread -----------------------------------------------------------------

    def run(self) -> None:
        """Steps until closed. An error of the engine itself ends what runs, not the engine."""
        while True:
            with self._changed:
                while not self._closing and self._is_idle():
                    self._changed.wait()
                if self._closing == "at once" or (self._closing and self._is_idle()):
                    break
            try:
                self.step()
            except Exception as error:
                logger.exception("a step failed; its requests end with an error")
                if self._batch is not None:
                    self._batch.fail(as_loralab_error(error))
        self._end_all()

    def step(self) -> bool:
        """Everything that can be done now, once; False where there was nothing."""
        called = self._run_calls()
        self._drop_cancelled()
        worked = self._run_jobs()
        self._admit()
        advanced = self._batch is not None and self._batch.step()
        return advanced or worked or called

    def _run_calls(self) -> bool:
        with self._changed:
            calls, self._calls = list(self._calls), deque()
        for function, future, changes, only in calls:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if changes and self._batch is not None:
                    self._batch.set_apart()
                result = function()
            except BaseException as error:  # the caller's own, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)
            finally:
                if changes and self.runner is not None:
                    with collector_paused():
                        self.runner.adapters_changed(only)
        return bool(calls)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped, self._cancelled = list(self._cancelled), deque()
            for ticket in dropped:
                self._requests.remove(ticket.request.tenant, ticket)
        for ticket in dropped:
            if self._batch is not None:
                self._batch.drop(ticket)
            ticket.end("cancelled")

    def _admit(self) -> None:
        """Gives free slots to waiting requests, the least served tenant first."""
        batch = self._batch
        while batch is not None and batch.slots.num_free:
            with self._changed:
                ticket = self._requests.pop(batch.may_begin)
            if ticket is None:
                return
            batch.begin(ticket)

    def _charge(self, tenant: str, prompt_tokens: int, answer_tokens: int) -> None:
        with self._changed:
            self._requests.charge(tenant, prompt_tokens, answer_tokens)
            self._generated[tenant] += answer_tokens

    # -- jobs --------------------------------------------------------------------------------

    def _run_jobs(self) -> bool:
        with self._changed:
            first = self._jobs.pop(self._can_run)
            if first is None:
                return False
            batch = [first] if first.kind == "score" else work.batch_of(tuple(self._jobs), first)
            for job in batch:
                self._jobs.remove(job.tenant, job)
                self._jobs.charge(job.tenant, len(job.token_ids), 0)
        batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if self._batch is not None and batch:
            if first.kind == "score":
                self._batch.score(first)
                return True
            self._batch.set_apart()
        if self.encoder is not None and batch:
            work.encode(self.encoder, batch)
        return True

    def _can_run(self, job: Job) -> bool:
        return job.kind != "score" or (self._batch is not None and self._batch.slots.num_free > 0)

    def _queue(self, job: Job) -> "Future[Any]":
        model = self.runner if job.kind == "score" else self.encoder
        if model is None:
            raise RequestError(
                f"this server has no model that can {job.kind}", "ask a server that has one."
            )
        _check(job.token_ids, model.max_tokens, model.vocab_size)
        with self._changed:
            self._check_open()
            self._jobs.put(job.tenant, job)
            self._changed.notify_all()
        return job.future

    # -- ends --------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        waiting = len(self._requests) + len(self._jobs) + len(self._calls) + len(self._cancelled)
        return not waiting and not (self._batch is not None and self._batch.answers)

    def _check_open(self) -> None:
        if self._closing:
            raise CapacityError("the server is shutting down", "ask again when it is back.")

    def _wake_for(self, ticket: Ticket) -> None:
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    def _end_all(self) -> None:
        """What is left when the engine closes at once."""
        batch = self._batch
        for answer in list(batch.answers) if batch is not None else ():
            answer.ticket.cancel()
        self._drop_cancelled()
        with self._changed:
            tickets, jobs, calls = list(self._requests), list(self._jobs), list(self._calls)
            for ticket in tickets:
                self._requests.remove(ticket.request.tenant, ticket)
            for job in jobs:
                self._jobs.remove(job.tenant, job)
            self._calls.clear()
        for ticket in tickets:
            ticket.end("cancelled")
        for future in [*(job.future for job in jobs), *(future for _, future, *_ in calls)]:
            future.cancel()
        if batch is not None:
            batch.set_apart()


def _check(token_ids: Sequence[int], most: int, vocab_size: int) -> None:
    """Raises `RequestError` for a prompt that cannot be read."""
    if not token_ids:
        raise RequestError("the prompt is empty", "give at least one token.")
    if len(token_ids) > most:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens, and at most {most} are read here",
            "shorten it, or serve with a larger `max_tokens`.",
        )
    wrong = [t for t in token_ids if not 0 <= t < vocab_size]
    if wrong:
        raise RequestError(
            f"token {wrong[0]} is none of the model's {vocab_size}",
            "encode the prompt with the served model's own tokenizer.",
        )
