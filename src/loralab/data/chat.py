"""Conversations -> tokens, through the tokenizer's own chat template."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralab.data.examples import Example
from loralab.errors import DataError

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


def encode_messages(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool], int]:
    """A conversation's tokens, which of them the assistant wrote, and where its last turn starts.

    The template says which tokens are the assistant's where it marks them with
    `{% generation %}`. Otherwise they are those that each of its turns adds to the conversation
    before it; this holds only if the conversation before is a prefix of the whole, token by token.
    Raises `DataError` where it is not, or where there is no template.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which rows of "
            "messages need",
            "use a model made for conversations, or rows with a prompt and a completion.",
        )
    if _GENERATION.search(template):
        return _by_marks(example, tokenizer)
    return _by_prefixes(example, tokenizer)


def _by_marks(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool], int]:
    encoded: Any = tokenizer.apply_chat_template(
        _turns(example),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    counts = [bool(mark) for mark in encoded["assistant_masks"]]
    starts = [i for i, mark in enumerate(counts) if mark and not (i and counts[i - 1])]
    return list(encoded["input_ids"]), counts, starts[-1] if starts else 0


def _by_prefixes(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool], int]:
    turns = _turns(example)
    ids = _render(tokenizer, turns)
    counts = [False] * len(ids)
    last_start = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if index == 0:
            raise DataError(
                f"row {example.id}: the conversation starts with the assistant",
                "begin with a turn of the user or the system.",
            )
        before = _render(tokenizer, turns[:index], add_generation_prompt=True)
        after = _render(tokenizer, turns[: index + 1])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"row {example.id}: the chat template of {tokenizer.name_or_path!r} writes turn "
                f"{index + 1} differently when the conversation goes on, so that it does not tell "
                "which tokens are the assistant's",
                "put {% generation %} around the assistant's turns in the template, or give one "
                "answer a row.",
            )
        counts[len(before) : len(after)] = [True] * (len(after) - len(before))
        last_start = len(before)
    return ids, counts, last_start


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict], *, add_generation_prompt: bool = False
) -> list[int]:
    text: Any = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    # the template writes the special tokens itself
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _turns(example: Example) -> list[dict]:
    return [dict(turn) for turn in example.messages or ()]
