"""Saying in a transformers config that tied weights are tied no more."""

import inspect
from typing import Any

from torch import nn

FLAG = "tie_word_embeddings"


def can_be_declared_untied(model: nn.Module) -> bool:
    """Whether the config's flag unties weights and does nothing else.

    Some models also scale by it what comes before the output layer (T5's family). For them both
    weights in the file say it: transformers ties no weights that it reads with different values.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, FLAG, False):
        return False
    scales = any(FLAG in _names_in_forward(type(module)) for module in model.modules())
    untied = type(config).from_dict({**config.to_dict(), FLAG: False})
    return not scales and getattr(untied, FLAG) is False


def _names_in_forward(kind: type[nn.Module]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code.co_names if code is not None else ()
