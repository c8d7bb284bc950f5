"""Repeated blocks under `torch.compile`: by region, one compilation for all of them.

Blocks that room fusion runs as one function each are left alone: compiling gains about a hundredth
there. A block's code is compiled for any number of rows and tokens, and draws dropout from torch's
own generator in the order of the uncompiled block, so that both train alike.

A resumed run must compile the same code. Compilers look at the sizes of the first batch they meet,
so that is never a batch of the run: it is one of `examples`, which depend on the rows alone.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, no_type_check
from weakref import WeakKeyDictionary

import torch
from torch import nn

from loralab.data import Row
from loralab.errors import CompileError, ModelError
from loralab.models import blocks

Backend = str | Callable[..., Any]

INDUCTOR = "inductor"
_SAME_DRAWS = {"fallback_random": True, "reorder_for_peak_memory": False}

FEWEST_STEPS = 200
"""Runs of fewer steps are not timed at all."""
LIKELY_COMPILE_SECONDS = 60.0
"""What a compilation is taken to cost before it is known; 20 to 150 s were seen."""
MOST_SAVED = 0.3
"""The largest share of a step that compiling is hoped to save."""
CLEARLY_FASTER = 0.97

_compiled: WeakKeyDictionary[nn.Module, dict[Backend, Callable[..., Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class CompileChoice:
    """Whether the blocks are compiled, why, and the seconds that were measured."""

    setting: Literal["on", "off"]
    reason: str
    eager_seconds: float | None = None  # of a forward and backward of `batch_size` rows
    compiled_seconds: float | None = None
    compile_seconds: float | None = None

    def facts(self) -> dict[str, Any]:
        """As plain data, for a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


class Regions:
    """Blocks of a model that can be run compiled."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], backend: Backend) -> None:
        self._model = model
        self._layers = list(layers)
        self._backend = backend

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside, the blocks run compiled. Raises `CompileError` where they cannot be."""
        from torch._dynamo.exc import TorchDynamoException  # costs seconds to import

        run = self._function()
        for layer in self._layers:
            layer._compiled_call_impl = partial(run, layer)
        try:
            with warnings.catch_warnings():
                # the compiler looks at what it is given, and a block is given a block's output
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
                yield
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            block, fault = type(self._layers[0]).__name__, " ".join(lines[:2])
            raise CompileError(
                f"torch.compile failed on a {block}: {fault}",
                "install a C++ compiler (g++ or clang++), or set training.compile to 'off'.",
            ) from error
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None

    def _function(self) -> Callable[..., Any]:
        """One function for all blocks; kept with the model, so that it compiles once a process."""
        functions = _compiled.setdefault(self._model, {})
        if self._backend not in functions:
            options: Any = _SAME_DRAWS if self._backend == INDUCTOR else None
            compiling: Any = torch.compile  # its stub leaves `isolate_recompiles` out
            functions[self._backend] = compiling(
                _call,
                dynamic=True,
                backend=self._backend,
                options=options,
                isolate_recompiles=True,
            )
        return functions[self._backend]


@no_type_check
def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def regions(
    model: nn.Module, others: Sequence[nn.Module], *, first: int = 0, backend: Backend = INDUCTOR
) -> Regions:
    """The model's blocks from number `first` on, without `others`, which run in another way."""
    try:
        _, layers = blocks(model)
    except ModelError:
        return Regions(model, [], backend)
    left_out = {id(module) for module in others}
    return Regions(model, [b for b in layers[first:] if id(b) not in left_out], backend)


def examples(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Batches of every kind that compiled code differs by: wide, narrow, with padding, without."""
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    shortest, longest = ordered[0], ordered[-1]
    longer = (row for row in ordered if row.num_tokens > shortest.num_tokens)
    second = next(longer, shortest)
    same = [[longest] * batch_size, [shortest] * batch_size]
    padded = [[row] * (batch_size - 1) + [shortest] for row in (longest, second)]
    return same + padded if batch_size > 1 else same


def fits(piece: Sequence[Row], batch_size: int) -> bool:
    """Whether compiled code for any size covers the piece: sizes of 1 are cases of their own."""
    return len(piece) > min(1, batch_size - 1) and any(row.num_tokens > 1 for row in piece)


def choose(
    run: Callable[[bool], None],
    compile_all: Callable[[], None],
    *,
    num_regions: int,
    num_steps: int,
    passes_per_step: int,
) -> CompileChoice:
    """Compiled blocks where they pay back, by measurement.

    run: a forward and backward of a batch, with compiled blocks or without. compile_all: compiles
    them. A run too short to gain is not timed, or not compiled.
    """
    if not num_regions:
        return CompileChoice("off", "there are no blocks that compiling covers")
    if num_steps < FEWEST_STEPS:
        return CompileChoice("off", f"{num_steps} steps are too few to pay a compilation back")
    run(False)
    eager = min(_seconds(partial(run, False)) for _ in range(2))
    saved = MOST_SAVED * eager * passes_per_step * num_steps
    if saved < LIKELY_COMPILE_SECONDS:
        reason = f"it can save {saved:.0f} s of this run, less than a compilation takes"
        return CompileChoice("off", reason, eager)
    try:
        compile_seconds = _seconds(compile_all)
    except CompileError as error:
        return CompileChoice("off", error.cause, eager)
    pairs = [[_seconds(partial(run, way)) for way in (False, True)] for _ in range(3)]
    eager, compiled = (min(times) for times in zip(*pairs, strict=True))
    reason = f"a pass takes {compiled:.3g} s compiled and {eager:.3g} s as it is"
    setting = "on" if compiled < CLEARLY_FASTER * eager else "off"
    return CompileChoice(setting, reason, eager, compiled, compile_seconds)


def _seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
