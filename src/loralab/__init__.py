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
        merge,
        save_adapter,
        targets,
        use,
    )
    from loralab.config import load_config
    from loralab.errors import LoralabError
    from loralab.models import load_model, load_tokenizer
    from loralab.runs.compare import compare
    from loralab.runs.evaluate import evaluate
    from loralab.runs.folder import Run, open_run
    from loralab.runs.generate import generate
    from loralab.runs.plan import plan
    from loralab.runs.train import train

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters",
    "LoRAConfig": "adapters",
    "LoralabError": "errors",
    "Run": "runs.folder",
    "attach": "adapters",
    "compare": "runs.compare",
    "detach": "adapters",
    "evaluate": "runs.evaluate",
    "generate": "runs.generate",
    "load_adapter": "adapters",
    "load_config": "config",
    "load_model": "models",
    "load_tokenizer": "models",
    "merge": "adapters",
    "open_run": "runs.folder",
    "plan": "runs.plan",
    "save_adapter": "adapters",
    "targets": "adapters",
    "train": "runs.train",
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
    "merge",
    "load_config",
    "train",
    "evaluate",
    "generate",
    "compare",
    "plan",
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
