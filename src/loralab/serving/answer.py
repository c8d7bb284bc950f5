"""One request while it is answered."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from loralab.errors import LoralabError
from loralab.serving.prefixes import Start
from loralab.serving.requests import Entry, FinishReason, Piece, Request
from loralab.serving.runner import Chunk
from loralab.serving.sampling import Chosen, Sampler
from loralab.serving.text import TextStream

logger = logging.getLogger("loralab")

Deliver = Callable[[Piece], None]


def _nobody(piece: Piece) -> None:
    """Takes the rest of an answer whose receiver has failed."""


class Ticket:
    """A submitted request: what its sender holds.

    num_cached_tokens: prompt tokens whose keys and values were there already.
    """

    def __init__(self, request: Request, deliver: Deliver, wake: Callable[["Ticket"], None]):
        self.request = request
        self.num_cached_tokens = 0
        self.finished = False
        self._deliver, self._wake = deliver, wake

    def cancel(self) -> None:
        """Ends the request soon, from any thread; its last piece says "cancelled"."""
        self._wake(self)

    def hand_over(self, piece: Piece) -> None:
        """Gives a piece to the sender; whose failure ends its own request and no other."""
        if self.finished:
            return
        self.finished = piece.finish_reason is not None
        try:
            self._deliver(piece)
        except Exception:
            logger.exception("a receiver failed; its request is cancelled")
            self._deliver = _nobody
            self.cancel()

    def end(self, reason: FinishReason, error: LoralabError | None = None) -> None:
        """Ends the request without another token."""
        self.hand_over(Piece(None, finish_reason=reason, error=error))


@dataclass
class Answer:
    """A running request: its slot, its tokens, and how the next one is chosen.

    tokens: the prompt's and the answer's. num_held: how many of them the slot holds.
    """

    ticket: Ticket
    start: Start
    tokens: list[int]
    sampler: Sampler
    text: TextStream
    max_tokens: int
    end_ids: frozenset[int]
    num_held: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_held = self.start.num_reused

    @classmethod
    def begin(
        cls,
        ticket: Ticket,
        start: Start,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        end_ids: frozenset[int],
    ) -> "Answer":
        """max_tokens: of prompt and answer together, as the slot holds no more."""
        request = ticket.request
        sampling, prompt = request.sampling, list(request.prompt_ids)
        ticket.num_cached_tokens = start.num_reused
        return cls(
            ticket,
            start,
            prompt,
            Sampler(sampling, prompt),
            TextStream(tokenizer, sampling.stop),
            max_tokens=min(len(prompt) + sampling.max_tokens, max_tokens),
            end_ids=frozenset() if sampling.ignore_eos else end_ids,
        )

    @property
    def slot(self) -> int:
        return self.start.slot.number

    @property
    def num_left(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return len(self.tokens) - self.num_held

    @property
    def num_prompt_left(self) -> int:
        return max(len(self.ticket.request.prompt_ids) - self.num_held, 0)

    def chunk(self, num_tokens: int, entry: Entry) -> Chunk:
        tokens = self.tokens[self.num_held : self.num_held + num_tokens]
        return Chunk(self.slot, tokens, self.num_held, entry)

    def hold(self, chunk: Chunk) -> None:
        """The chunk was computed."""
        self.start.slot.tokens.extend(chunk.token_ids)
        self.num_held += len(chunk.token_ids)

    def add(self, chosen: Chosen) -> None:
        """Takes the next token and hands the piece over."""
        token = chosen.token_id
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.end_ids:
            text, reason = self.text.finish(), "stop"
        else:
            text = self.text.add(token)
            if not self.text.stopped and len(self.tokens) >= self.max_tokens:
                text, reason = text + self.text.finish(), "length"
        if self.text.stopped:
            reason = "stop"
        self.ticket.hand_over(Piece(token, text, chosen.logprob, chosen.top_logprobs, reason))
