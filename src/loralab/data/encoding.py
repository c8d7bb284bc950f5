"""Examples -> token ids, and which tokens count for the loss.

A prompt and its completion are tokenised apart and put together, because that is what a model
sees when it writes: the prompt's tokens, then tokens of its own.
"""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralab.config import Task
from loralab.data.chat import encode_messages
from loralab.data.examples import IGNORED, Encoded, Example
from loralab.errors import ConfigError, DataError

logger = logging.getLogger("loralab")


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task,
    max_tokens: int,
) -> list[Encoded]:
    """The examples' token ids, at most `max_tokens` each, with the tokenizer's special tokens.

    Causal rows end with the end-of-text token. All of a text counts for the loss; of a prompt and
    completion only the completion; of a conversation only the assistant's turns. Too long a text
    loses its end; a prompt its beginning, and its completion only what then still does not fit;
    a conversation likewise, its last turn being the completion.

    Raises `DataError` for rows without tokens or without targets, and for chat templates that
    cannot tell the assistant's tokens.
    """
    limit = _limit(tokenizer, task, max_tokens)
    if task == "classification":
        rows = _encode_texts(examples, tokenizer, limit)
    else:
        rows = [_encode_causal(example, tokenizer, limit) for example in examples]
    _refuse_empty(rows, task)
    num_cut = sum(row.num_cut > 0 for row in rows)
    if num_cut:
        logger.warning("%d of %d rows were cut to %d tokens", num_cut, len(rows), limit)
    return rows


def encoding_facts(rows: Sequence[Encoded]) -> dict[str, Any]:
    """How long the rows are in tokens and how much of them was cut."""
    lengths = [len(row.input_ids) for row in rows]
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "longest_tokens": max(lengths, default=0),
        "target_tokens": sum(row.num_targets for row in rows if row.targets is not None),
        "cut_rows": sum(row.num_cut > 0 for row in rows),
        "cut_tokens": sum(row.num_cut for row in rows),
    }


def _limit(tokenizer: PreTrainedTokenizerBase, task: Task, max_tokens: int) -> int:
    if task == "causal" and max_tokens < 2:
        raise ConfigError(
            f"data.max_tokens is {max_tokens}: a token needs one before it to be predicted from",
            "set data.max_tokens to 2 or more.",
        )
    if max_tokens > tokenizer.model_max_length:
        limit = tokenizer.model_max_length
        logger.warning("data.max_tokens is %d; the model takes %d", max_tokens, limit)
        return limit
    return max_tokens


def _encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Encoded]:
    texts = [example.text or "" for example in examples]
    if not texts:
        return []
    whole = tokenizer(texts, verbose=False)["input_ids"]
    cut = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    return [
        Encoded(
            example.id,
            example.group,
            input_ids=tuple(ids),
            label=example.label,
            num_cut=len(all_ids) - len(ids),
        )
        for example, ids, all_ids in zip(examples, cut, whole, strict=True)
    ]


def _encode_causal(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int) -> Encoded:
    if example.messages is not None:
        ids, counts, keep_from = encode_messages(example, tokenizer)
        num_leading = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    elif example.completion is not None:
        leading, prompt = _with_special(tokenizer, example.prompt or "")
        completion = _plain(tokenizer, example.completion) + _end(tokenizer)
        ids = leading + prompt + completion
        num_leading, keep_from = len(leading), len(leading) + len(prompt)
        counts = [index >= keep_from for index in range(len(ids))]
    else:
        leading, text = _with_special(tokenizer, example.text or "")
        ids = leading + text + _end(tokenizer)
        num_leading = keep_from = len(leading)
        counts = [index >= keep_from for index in range(len(ids))]
    kept = _kept(len(ids), num_leading, keep_from, limit)
    return Encoded(
        example.id,
        example.group,
        input_ids=tuple(ids[index] for index in kept),
        targets=tuple(ids[index] if counts[index] else IGNORED for index in kept),
        num_cut=len(ids) - len(kept),
    )


def _kept(num_tokens: int, num_leading: int, keep_from: int, limit: int) -> list[int]:
    """Which of the tokens stay: the leading special ones, then as much as fits.

    Tokens from `num_leading` to `keep_from` are the context, which is cut on its left; one of
    them stays where nothing else stands before the rest. The rest is cut on its right.
    """
    least_context = 0 if num_leading else min(keep_from, 1)
    room = limit - num_leading - (num_tokens - keep_from)
    num_context = min(keep_from - num_leading, max(room, least_context))
    leading = range(min(num_leading, limit))
    return [*leading, *range(keep_from - num_context, num_tokens)][:limit]


def _with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text, and the text's own tokens."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, is_special = encoded["input_ids"], encoded["special_tokens_mask"]
    num_own = len(is_special) - sum(is_special)
    num_leading = is_special.index(0) if num_own else 0
    # special tokens behind the text (a separator, an end) would stand in the middle of the row
    return ids[:num_leading], ids[num_leading : num_leading + num_own]


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so that a model "
            "could not learn where to stop",
            "use the tokenizer of a causal language model.",
        )
    # the hint allows lists of ids, which no tokenizer here has
    return [int(tokenizer.eos_token_id)]  # pyright: ignore[reportArgumentType]


def _refuse_empty(rows: Sequence[Encoded], task: Task) -> None:
    if task == "classification":
        empty, what = [row.id for row in rows if not row.input_ids], "no tokens"
    else:
        empty = [row.id for row in rows if row.num_targets == 0]
        what = "no token that counts for the loss"
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise DataError(
            f"rows with {what}: {', '.join(empty[:3])}{more}",
            "leave these rows out, or raise data.max_tokens.",
        )
