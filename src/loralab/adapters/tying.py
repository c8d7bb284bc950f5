"""Weights that a transformers model declares tied, and how its config says that they no longer are.

Two modules may also share a parameter without a word. Then a change of one side stays there.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

FLAG = "tie_word_embeddings"


def declared_ties(modules: Mapping[str, nn.Module]) -> set[str]:
    """Full names of the weights that a model, or a model inside it, declares tied to another."""
    found: set[str] = set()
    for path, module in modules.items():
        ties = getattr(module, "all_tied_weights_keys", None)
        for pair in ties.items() if isinstance(ties, Mapping) else ():
            found.update(f"{path}.{name}" if path else name for name in pair)
    return found


def tied_tables(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The other modules whose weight is declared tied to this embedding's, and is it."""
    table = modules[path]._parameters.get("weight")
    sharing = [
        other
        for other, module in modules.items()
        if other != path and table is not None and module._parameters.get("weight") is table
    ]
    if not sharing:
        return []
    declared = declared_ties(modules)
    return [other for other in sharing if f"{other}.weight" in declared]


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
