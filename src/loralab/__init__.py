"""loralab: fine-tune with low-rank adapters, prove that it worked, serve many on one base.

Names are loaded when first used, so that `import loralab` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralab.adapters import (
        Adapter,
        LoRAConfig,
        attach,
        detach,
        load_adapter,
        save_adapter,
        targets,
        use,
    )
    from loralab.config import load_config
    from loralab.errors import LoralabError
    from loralab.models import load_model, load_tokenizer
    from loralab.runs import Run, compare, evaluate, generate, open_run, train

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters",
    "LoRAConfig": "adapters",
    "LoralabError": "errors",
    "Run": "runs",
    "attach": "adapters",
    "compare": "runs",
    "detach": "adapters",
    "evaluate": "runs",
    "generate": "runs",
    "load_adapter": "adapters",
    "load_config": "config",
    "load_model": "models",
    "load_tokenizer": "models",
    "open_run": "runs",
    "save_adapter": "adapters",
    "targets": "adapters",
    "train": "runs",
    "use": "adapters",
}

__all__ = [  # noqa: RUF022  (the order of a first reading)
    "load_model",
    "load_tokenizer",
    "LoRAConfig",
    "Adapter",
    "targets",
    "attach",
    "use",
    "detach",
    "save_adapter",
    "load_adapter",
    "load_config",
    "train",
    "evaluate",
    "generate",
    "compare",
    "open_run",
    "Run",
    "LoralabError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loralab' has no attribute {name!r}")
    return getattr(import_module(f"loralab.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
