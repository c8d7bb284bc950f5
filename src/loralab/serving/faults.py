"""Failures that are nobody's mistake, as errors that a client can be told."""

import torch

from loralab.errors import CapacityError, LoralabError

_NO_MEMORY = ("can't allocate memory", "not enough memory")  # how torch says it on a CPU


def out_of_memory(error: BaseException) -> CapacityError | None:
    """What a client is told where the failure is a lack of memory, which may pass; else None."""
    is_ours = isinstance(error, MemoryError | torch.OutOfMemoryError)
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    if not is_ours and not told:
        return None
    return CapacityError("memory ran out", "try again in a moment, or with a shorter prompt.")


def as_loralab_error(error: Exception) -> LoralabError:
    """Any failure of the model as an error that a user can be told."""
    if isinstance(error, LoralabError):
        return error
    return out_of_memory(error) or LoralabError(
        f"the model failed: {type(error).__name__}: {error}", "the server's log has the traceback."
    )
