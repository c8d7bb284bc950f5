"""From tokens to text while they come: whole characters only, and nothing of a stop text."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoders give for bytes that are no character, or not yet one


class TextStream:
    """The text of one answer, piece by piece.

    The pieces joined are what decoding all tokens at once gives, cut before the first stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        # transformers' own decode does the same in five times the time
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer: Any = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._context = 0  # tokens before it are out of sight; up to `_done` they are context
        self._done = 0
        self._given = 0  # characters after the context's that were given already
        self._held = ""  # may be the beginning of a stop text
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that a token completes. `stopped` is set where a stop text is reached."""
        self._tokens.append(token_id)
        return self._pass(self._decode_new(last=False))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        rest = self._pass(self._decode_new(last=True))
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _decode_new(self, *, last: bool) -> str:
        """New characters: all whole ones; at the end the incomplete ones, too.

        A few tokens before the new ones are decoded with them, since a token's text depends on what
        is before it (spaces). It is that of vLLM's and transformers' streamers, but whole
        characters before an incomplete one are not held back.
        """
        before = len(self._decode(self._tokens[self._context : self._done])) + self._given
        text = self._decode(self._tokens[self._context :])
        whole = text if last else text.rstrip(INCOMPLETE)
        new = whole[before:]
        if len(whole) == len(text) and new:
            self._context, self._done, self._given = self._done, len(self._tokens), 0
        else:
            self._given += len(new)
        return new

    def _decode(self, tokens: list[int]) -> str:
        if self._fast is not None:
            return self._fast.decode(tokens, skip_special_tokens=True)
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _pass(self, new: str) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else new
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that begins the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the model's generation settings, and the tokenizer's."""
    settings = getattr(model, "generation_config", None)
    own: Any = getattr(settings, "eos_token_id", None)
    listed: Iterable[int] = own if isinstance(own, list | tuple) else [own]
    ids = [*listed, getattr(tokenizer, "eos_token_id", None)]
    return frozenset(token for token in ids if token is not None)
