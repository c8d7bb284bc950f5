"""Pieces in OpenAI's shapes: log-probabilities of tokens, and what streams are made of."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from loralab.serving.http.answers import (
    ChatLogprobs,
    ChosenLogprob,
    CompletionLogprobs,
    PromptDetails,
    TokenLogprob,
    Usage,
)
from loralab.serving.requests import Piece
from loralab.serving.sampling import Chosen

END = b"data: [DONE]\n\n"
LEAST = -9999.0  # OpenAI's, for what is no number in JSON


def event(content: BaseModel | dict[str, Any]) -> bytes:
    """One server-sent event."""
    if isinstance(content, BaseModel):
        return f"data: {content.model_dump_json()}\n\n".encode()
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def usage(num_prompt: int, num_answer: int = 0, num_cached: int = 0) -> Usage:
    """Counts of tokens. Of several answers to one prompt, the prompt counts once."""
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_answer,
        total_tokens=num_prompt + num_answer,
        prompt_tokens_details=PromptDetails(cached_tokens=min(num_cached, num_prompt)),
    )


class TokenTexts:
    """Tokens as text, one by one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """What a token stands for; a part of a character shows as U+FFFD."""
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def completion(self, tokens: Sequence[Piece | Chosen], offset: int = 0) -> CompletionLogprobs:
        """Columns for `/v1/completions`. offset: characters before the first token."""
        made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            if token.token_id is None:
                continue
            text = self.text(token.token_id)
            made.tokens.append(text)
            made.text_offset.append(offset)
            offset += len(text)
            made.token_logprobs.append(None if token.logprob is None else _finite(token.logprob))
            best = None
            if token.logprob is not None:
                best = {self.text(other): _finite(value) for other, value in token.top_logprobs}
                best.setdefault(text, _finite(token.logprob))
            made.top_logprobs.append(best)
        return made

    def chat(self, pieces: Sequence[Piece]) -> ChatLogprobs:
        """Rows for `/v1/chat/completions`."""
        rows = []
        for piece in pieces:
            if piece.token_id is None or piece.logprob is None:
                continue
            chosen = self._row(piece.token_id, piece.logprob)
            best = [self._row(other, value) for other, value in piece.top_logprobs]
            rows.append(ChosenLogprob(**chosen.model_dump(), top_logprobs=best))
        return ChatLogprobs(content=rows)

    def _row(self, token_id: int, logprob: float) -> TokenLogprob:
        text = self.text(token_id)
        whole = "\ufffd" not in text
        return TokenLogprob(
            token=text, logprob=_finite(logprob), bytes=list(text.encode()) if whole else None
        )


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST)
