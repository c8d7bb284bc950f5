"""Attention masks without a question to the device: the host knows which batches are padded.

transformers makes no mask for a batch without padding, and looks for padding in the mask itself:
on a GPU every forward would wait until all work before it is done.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from loralab.data import Encoded

_is_padded: ContextVar[bool | None] = ContextVar("is_padded", default=None)


@contextmanager
def known_padding(rows: Sequence[Encoded]) -> Iterator[None]:
    """Inside, masks are those of `rows` padded to the longest; what they hold is not looked at."""
    token = _is_padded.set(len({row.num_tokens for row in rows}) > 1)
    try:
        yield
    finally:
        _is_padded.reset(token)


def _without_looking(make: Callable[..., Any]) -> Callable[..., Any]:
    """What `make` gives, which looks at a mask only where it may leave it out."""

    @functools.wraps(make)
    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler would stop at the context variable
            return make(*args, attention_mask=attention_mask, **kwargs)
        is_padded = _is_padded.get()
        if is_padded:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        given = None if is_padded is False else attention_mask
        return make(*args, attention_mask=given, **kwargs)

    return mask


for _name in ("sdpa", "eager"):
    _make = _without_looking(ALL_MASK_ATTENTION_FUNCTIONS[_name])
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _make)
