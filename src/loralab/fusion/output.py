"""The loss of a frozen output layer without its logits: made in chunks, gradient in the forward.

Logits are by far the largest tensor of a causal step (tokens x vocabulary, in fp32). What is wanted
of them is a loss and `(softmax - one-hot) W`, which has the size of the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.adapters import base_member
from loralab.fusion.proof import agrees
from loralab.fusion.watching import run_few_tokens
from loralab.models import evaluating
from loralab.native import products

CHUNK_NUMBERS = 1 << 23
"""Logits made at once: 32 MiB of fp32."""


class HiddenStatesError(Exception):
    """Not an error: it ends a forward at the output layer, with what that was given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def stopped_at(layer: nn.Module) -> Iterator[None]:
    """Inside, a forward that reaches `layer` raises `HiddenStatesError`."""

    def stop(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise HiddenStatesError(arguments[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def frozen_output_layer(model: nn.Module) -> nn.Linear | None:
    """The output layer, where the model's logits are `W h + b` of it and it does not train.

    It is tried, since models scale or cap their logits behind it. Costs a forward of few tokens.
    """
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(layer, nn.Linear) or hasattr(layer, "adapters") or not base_member(layer):
        return None
    given: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    try:
        with evaluating(model), torch.no_grad():
            logits = run_few_tokens(model, None).logits
    finally:
        handle.remove()
    plain = len(given) == 1 and agrees(F.linear(given[0], layer.weight, layer.bias), logits)
    return layer if plain else None


def token_nll_sum(
    hidden: Float[Tensor, "tokens width"],
    layer: nn.Linear,
    targets: Int[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """The summed negative log-likelihood of `targets`, in nats; differentiable in `hidden`."""
    return _TokenNLL.apply(hidden, layer.weight, layer.bias, targets)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    @no_type_check
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor):
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, CHUNK_NUMBERS // weight.shape[0])
        chunks = zip(hidden.split(size), targets.split(size), gradient.split(size), strict=True)
        for states, wanted, place in chunks:
            logits = products.linear(states, [weight], [bias])[0].float()
            log_total = logits.logsumexp(-1, keepdim=True)
            own = logits.gather(-1, wanted[:, None])
            total += (log_total - own).sum()
            probabilities = logits.sub_(log_total).exp_()
            probabilities.scatter_add_(-1, wanted[:, None], -torch.ones_like(own))
            place.copy_(products.linear_backward([probabilities.to(hidden.dtype)], [weight], None))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx: Any, g: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * g).to(gradient.dtype), None, None, None
