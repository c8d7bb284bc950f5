"""The training step of an adapted convolution: one autograd function that keeps the input alone.

`y = W * x + b + s B (A * (m x))` with a dropout mask m (`*` convolves, B mixes channels at each
position). The mask, the masked input and `A * x` are made again in the backward pass. Where nothing
is dropped, and the output has more positions than channels, the pair goes into the kernel instead,
`y = (W + s B A) * x + b`: one walk over the input less in either direction. Not in half precision,
which would round the pair away. What is left, the gradients of A and B, is one call of the room
native where it has a kernel. The plain formula is `layers.low_rank`.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralab.adapters.items import Pair
from loralab.adapters.layers import CONVOLUTION
from loralab.adapters.noise import Places, draw_places, mask_at
from loralab.adapters.routes import Mix
from loralab.native import convolutions as native

_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Geometry(NamedTuple):
    """How a convolution walks over its input, as torch's operators take it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> "Geometry":
        """That of a kernel of size one on this one's output."""
        dimensions = len(self.stride)
        return Geometry((1,) * dimensions, (0,) * dimensions, (1,) * dimensions, self.groups)


@dataclass(frozen=True)
class Convolution:
    """A frozen convolution, and what a pair adds to it.

    scale: `scale / (1 - dropout)` of the pair, times its weight in the route.
    """

    weight: Float[Tensor, "out channels *kernel"]
    bias: Float[Tensor, " out"] | None
    geometry: Geometry
    scale: float
    dropout: float | int


def convolution_of(module: nn.Module, mix: Mix) -> tuple[Convolution, Pair] | None:
    """The module for the step, where it is a plain frozen convolution with one plain pair.

    None for everything else: DoRA, trained biases, several adapters at once, padding that is not
    zeros, PEFT's form of a grouped convolution, a base that trains.
    """
    conv: Any = module
    if getattr(module, "base_class", type(module)).forward not in _FORWARDS or len(mix) != 1:
        return None
    name, route_weight = mix[0]
    pair = conv.adapters.get(name)
    if not isinstance(pair, Pair) or pair.magnitude is not None or pair.bias is not None:
        return None
    if any(p.requires_grad for p in (conv.weight, conv.bias) if p is not None):
        return None
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or pair.layer.groups > 1:
        return None
    dropout = pair.dropout if pair.training else 0.0
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    scale = pair.scale * route_weight / (1 - dropout)
    return Convolution(conv.weight, conv.bias, geometry, scale, dropout), pair


def takes(convolution: Convolution, x: Any) -> bool:
    """Whether the step can take `x`: a batch in the weight's dtype, outside of autocasting."""
    return (
        isinstance(x, Tensor)
        and x.ndim == convolution.weight.ndim
        and x.dtype == convolution.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def convolution_step(
    x: Float[Tensor, "batch channels *places"],
    convolution: Convolution,
    A: Float[Tensor, "rank columns"],
    B: Float[Tensor, "out rank"],
) -> Float[Tensor, "batch out *_"]:
    """The adapted convolution's output, differentiable in `x` and the factors."""
    places = draw_places(CONVOLUTION.lines(x)) if convolution.dropout else None
    return ConvolutionStep.apply(x, convolution, places, A, B)


class ConvolutionStep(torch.autograd.Function):
    """The formula above with its gradient."""

    @staticmethod
    @no_type_check
    def forward(
        ctx: Any, x: Tensor, own: Convolution, places: Places | None, A: Tensor, B: Tensor
    ) -> Tensor:
        ctx.own = own
        ctx.save_for_backward(x, places, A, B)
        if _merges(own, x):
            return _convolve(x, _merged(own, A, B), own.bias, own.geometry)
        mask = _mask(x, places, own)
        dropped = x if mask is None else mask.mul_(x)
        hidden = _convolve(dropped, _shrinking(own, A, x.dtype), None, own.geometry)
        y = _convolve(x, own.weight, own.bias, own.geometry)
        expanding = _expanding(own, B, x.dtype)
        return y.add_(_convolve(hidden, expanding, None, own.geometry.pointwise), alpha=own.scale)

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx: Any, g: Tensor):
        x, places, A, B = ctx.saved_tensors
        own, geometry = ctx.own, ctx.own.geometry
        wants_input = ctx.needs_input_grad[0]
        merges = _merges(own, x)
        if merges and geometry.groups == 1 and native.covers(x, A, B):
            through, grads = None, _by_kernel(x, g, own, A, B)
        else:
            mask, wants_pair = _mask(x, places, own), wants_input and not merges
            through, grads = _pair_backward(x, g, own, A, B, mask, wants_input=wants_pair)
        if not wants_input:
            return None, None, None, *grads
        kernel = _merged(own, A, B) if merges else own.weight
        grad_x, _ = _backward(g, x, kernel, geometry, wants_kernel=False)
        if through is not None:
            grad_x.add_(through)
        return grad_x, None, None, *grads


def _by_kernel(
    x: Tensor,
    g: Tensor,
    own: Convolution,
    A: Float[Tensor, "rank columns"],
    B: Float[Tensor, "out rank"],
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B."""
    stride, padding, dilation, _ = own.geometry
    kernel = own.weight.shape[2:]
    walk = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return native.pair_gradients(x, g, A, B, scale=own.scale, **walk)


def _pair_backward(
    x: Tensor,
    g: Tensor,
    own: Convolution,
    A: Float[Tensor, "rank columns"],
    B: Float[Tensor, "out rank"],
    mask: Tensor | None,
    *,
    wants_input: bool,
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """The gradient of the input through the pair, None where unwanted; those of A and B."""
    geometry = own.geometry
    dropped = x if mask is None else mask * x
    shrinking, expanding = _shrinking(own, A, x.dtype), _expanding(own, B, x.dtype)
    hidden = _convolve(dropped, shrinking, None, geometry)
    grad_hidden, grad_B = _backward(g, hidden, expanding, geometry.pointwise)
    through, grad_A = _backward(
        grad_hidden.mul_(own.scale), dropped, shrinking, geometry, wants_input=wants_input
    )
    if through is not None and mask is not None:
        through.mul_(mask)
    grad_A = grad_A.unflatten(0, (geometry.groups, -1)).sum(0)
    grads = grad_A.view(A.shape).to(A.dtype), grad_B.view(B.shape).to(B.dtype).mul_(own.scale)
    return through, grads


def _mask(x: Tensor, places: Places | None, own: Convolution) -> Tensor | None:
    if places is None:
        return None
    return mask_at(CONVOLUTION.lines(x), places, own.dropout).view(x.shape)


def _merges(own: Convolution, x: Float[Tensor, "batch channels *places"]) -> bool:
    """Whether the pair goes into the kernel for this input."""
    strides = math.prod(own.geometry.stride)
    positions = x.shape[0] * math.prod(x.shape[2:]) // strides
    exact = x.dtype in (torch.float32, torch.float64)
    return exact and not own.dropout and positions >= own.weight.shape[0]


def _merged(
    own: Convolution, A: Float[Tensor, "rank columns"], B: Float[Tensor, "out rank"]
) -> Float[Tensor, "out channels *kernel"]:
    """`W + s B A`."""
    if native.covers(own.weight, A, B):
        return native.merged(own.weight, A, B, own.scale)
    flat = own.weight.flatten(1)
    delta = A.to(flat.dtype), B.to(flat.dtype)
    return torch.addmm(flat, delta[1], delta[0], alpha=own.scale).view_as(own.weight)


def _shrinking(
    own: Convolution, A: Float[Tensor, "rank columns"], dtype: torch.dtype
) -> Float[Tensor, "_ channels *kernel"]:
    """A as a kernel of the base's size; each group applies it to its own channels."""
    kernel = A.to(dtype).view(A.shape[0], *own.weight.shape[1:])
    groups = own.geometry.groups
    return kernel if groups == 1 else kernel.repeat(groups, *(1 for _ in kernel.shape[1:]))


def _expanding(
    own: Convolution, B: Float[Tensor, "out rank"], dtype: torch.dtype
) -> Float[Tensor, "out rank *_"]:
    return B.to(dtype).view(*B.shape, *(1 for _ in own.geometry.stride))


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    none = (0,) * len(stride)
    return torch.convolution(x, kernel, bias, stride, padding, dilation, False, none, groups)


def _backward(
    g: Tensor,
    x: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    *,
    wants_input: bool = True,
    wants_kernel: bool = True,
) -> tuple[Any, Any]:
    """The gradients of the input and of the kernel, None where unwanted."""
    stride, padding, dilation, groups = geometry
    none = (0,) * len(stride)
    wanted = (wants_input, wants_kernel, False)
    grad_x, grad_kernel, _ = torch.ops.aten.convolution_backward.default(
        g, x, kernel, None, stride, padding, dilation, False, none, groups, wanted
    )
    return grad_x, grad_kernel
