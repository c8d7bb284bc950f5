"""Running a model's frozen lower blocks once a row, and its upper blocks from what they gave."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from loralab.errors import ModelError
from loralab.models.structure import blocks


def run_prefix(
    model: nn.Module,
    num_blocks: int,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Shaped[Tensor, "rows tokens"],
) -> Float[Tensor, "rows tokens width"]:
    """The hidden states after the first `num_blocks` blocks: what the next block is given.

    Without gradient and without dropout; the model's training flags are as before afterwards.
    Only the lower blocks run. Raises `ModelError` for a number of blocks that the model lacks.
    """
    last = _lower(model, num_blocks)[-1]

    def stop(_block: nn.Module, _arguments: Any, output: Any) -> None:
        raise _ReachedError(_hidden_of(output))

    handle = last.register_forward_hook(stop)
    try:
        with torch.no_grad(), evaluating(model):
            model(input_ids=input_ids, attention_mask=attention_mask)
    except _ReachedError as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise ModelError(
        f"{type(model).__name__} never calls its block {num_blocks - 1}",
        "set training.cache_frozen_prefix = false.",
    )


@contextmanager
def replaced_prefix(
    model: nn.Module, num_blocks: int, hidden: Float[Tensor, "rows tokens width"]
) -> Iterator[None]:
    """Inside, a forward of `model` passes over its first `num_blocks` blocks and goes on with
    `hidden` (rows, tokens, width), the result of `run_prefix` for the same batch.

    Embeddings, masks and rotary angles are the model's own. Gradients of the upper blocks are
    those of the plain forward; nothing below them gets one. Raises `ModelError` where `hidden`
    has another shape than the batch, or where blocks hand each other more than hidden states.
    """
    with ExitStack() as stack:
        for block in _lower(model, num_blocks):
            stack.enter_context(_passing_over(block, hidden))
        yield


class _ReachedError(Exception):
    """Ends a forward whose rest is not needed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


_tuple_sizes: dict[type[nn.Module], int] = {}
"""How many values a block of a class returns as a tuple; 0 for a bare tensor."""


@contextmanager
def _passing_over(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    # On the instance: the class's forward stays for the upper blocks, and so do hooks and names.
    own = vars(block).get("forward")
    block.forward = _stand_in(block, block.forward, hidden)
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _stand_in(block: nn.Module, original: Callable[..., Any], hidden: Tensor) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        if given.shape != hidden.shape:
            raise ModelError(
                f"hidden states of shape {tuple(hidden.shape)} for a batch of shape "
                f"{tuple(given.shape)}",
                "give the result of run_prefix for the same batch.",
            )
        kind = type(block)
        if kind not in _tuple_sizes:
            # Nothing but a call tells; this happens once for a class of blocks.
            with torch.no_grad():
                _tuple_sizes[kind] = _tuple_size(original(*args, **kwargs), kind)
        size = _tuple_sizes[kind]
        return hidden if not size else (hidden,) + (None,) * (size - 1)

    return forward


def _tuple_size(output: Any, kind: type[nn.Module]) -> int:
    if isinstance(output, Tensor):
        return 0
    if isinstance(output, tuple) and all(value is None for value in output[1:]):
        return len(output)
    raise ModelError(
        f"blocks of class {kind.__name__} hand each other more than hidden states",
        "set training.cache_frozen_prefix = false.",
    )


def _hidden_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _lower(model: nn.Module, num_blocks: int) -> list[nn.Module]:
    name, layers = blocks(model)
    if not 1 <= num_blocks <= len(layers):
        raise ModelError(
            f"a prefix of {num_blocks} blocks: {name} has {len(layers)}",
            f"give a number from 1 to {len(layers)}.",
        )
    return list(layers)[:num_blocks]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module is in training mode; afterwards those are that were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
