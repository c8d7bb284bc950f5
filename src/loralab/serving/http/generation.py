"""The answers to one request, from the engine's thread to the event loop."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from loralab.errors import CapacityError, LoralabError
from loralab.serving.answer import Ticket
from loralab.serving.http.service import Admission, too_long
from loralab.serving.requests import Piece, Request, Sampling

logger = logging.getLogger("loralab")


@dataclass
class Ended:
    """One answer as a whole."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str | None:
        """Why it ended."""
        return self.pieces[-1].finish_reason


class Generation:
    """Several answers under one admission, which lasts until the engine has ended all of them.

    Whoever stops listening calls `cancel`; the engine's slots are free soon afterwards.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.num_prompt_tokens = self.num_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._open = 0
        self._lock = threading.Lock()
        self._waits_for_first = True

    def submit(self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> None:
        """Queues one answer for each prompt and settings. Raises as `Engine.submit`."""
        service, resolved = self.admission.service, self.admission.resolved
        self._open = len(prompts)
        self.admission.hand_over()
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            asked = Request(
                prompt_ids=tuple(prompt),
                entry=resolved.entry,
                identity=resolved.identity,
                sampling=sampling,
                tenant=self.admission.target.tenant,
            )
            try:
                self._tickets.append(service.engine.submit(asked, self._deliver(index)))
            except BaseException:
                self.cancel()
                self._close(len(prompts) - index)
                raise
        self.num_prompt_tokens = sum(map(len, {tuple(prompt) for prompt in prompts}))
        self.admission.charge(sum(map(len, prompts)))

    def num_cached(self, every: int) -> int:
        """Prompt tokens that were there already, of the first answer of `every` to a prompt."""
        return sum(ticket.num_cached_tokens for ticket in self._tickets[::every])

    def cancel(self) -> None:
        """Ends all answers soon."""
        for ticket in self._tickets:
            if not ticket.finished:
                ticket.cancel()

    async def pieces(self, num: int, deadline: float) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, piece) as they come, until all `num` answers have ended.

        Raises the error that an answer ended with, and `TookTooLongError` after the deadline (a
        time of the loop's clock).
        """
        while num:
            try:
                async with asyncio.timeout_at(deadline):
                    index, piece = await self._queue.get()
            except TimeoutError:
                raise too_long(self.admission.service.limits.request_seconds) from None
            if piece.finish_reason in ("error", "cancelled"):
                raise piece.error or CapacityError(
                    "the answer was cut short: the server is closing", "ask again in a moment."
                )
            num -= piece.finish_reason is not None
            yield index, piece

    async def all(self, num: int, deadline: float) -> list[Ended]:
        """All answers, whole."""
        answers = [Ended() for _ in range(num)]
        async for index, piece in self.pieces(num, deadline):
            answers[index].pieces.append(piece)
        return answers

    def record(self, outcome: str, error: LoralabError | None = None) -> None:
        """Counts the request and writes its line into the log."""
        service, target = self.admission.service, self.admission.target
        service.metrics.requests.labels(target.label, outcome).inc()
        service.metrics.tokens.labels(target.label, "prompt").inc(self.num_prompt_tokens)
        service.metrics.tokens.labels(target.label, "answer").inc(self.num_tokens)
        logger.info(
            "%s: %d + %d tokens in %.2f s, %s",
            self.admission.resolved.fingerprint,
            self.num_prompt_tokens,
            self.num_tokens,
            time.perf_counter() - self.admission.started,
            outcome if error is None else f"{outcome} ({error.cause})",
        )

    # on the engine's thread ---------------------------------------------------------------------

    def _deliver(self, index: int) -> Callable[[Piece], None]:
        def deliver(piece: Piece) -> None:
            if piece.token_id is not None:
                self.num_tokens += 1
                self.admission.charge(1)
                if self._waits_for_first:
                    self._waits_for_first = False
                    label = self.admission.target.label
                    seconds = time.perf_counter() - self.admission.started
                    self.admission.service.metrics.first_token.labels(label).observe(seconds)
            if piece.finish_reason is not None:
                self._close(1)
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return deliver

    def _close(self, num: int) -> None:
        with self._lock:
            self._open -= num
            ended = self._open == 0
        if ended:
            self.admission.end()
