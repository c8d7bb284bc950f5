"""The low-rank path of each kind of layer: `A` shrinks the input to the rank, `B` expands it.

A: (rank, in), B: (out, rank), whatever the layer; a convolution's A is its kernel, flattened.

What runs inside `torch.compile` is marked `no_type_check`: checks of types at run time, as the
tests do them, would be traced and compiled too.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, cast, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.adapters.adapter import Kind, Layer


class Path(ABC):
    """How one kind of layer applies a pair. `hidden` keeps the input's rows as dimension 0."""

    @abstractmethod
    def features(self, module: nn.Module) -> tuple[int, int]:
        """(out, in) of the delta."""

    @abstractmethod
    def matrix(self, module: nn.Module) -> Float[Tensor, "out in"]:
        """The base weight as the matrix that the delta is added to (a view)."""

    @abstractmethod
    def shrink(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """`A x`: the hidden value, rank in the dimension that `expand` reads."""

    @abstractmethod
    def expand(self, module: nn.Module, hidden: Tensor, B: Tensor) -> Tensor:
        """`B hidden`: shaped like the layer's output."""

    @no_type_check
    def per_output(self, values: Float[Tensor, "out"], y: Tensor) -> Tensor:
        """One value an output, shaped to meet the layer's output `y`."""
        return values

    @no_type_check
    def lines(self, x: Tensor) -> Tensor:
        """The input as lines whose entries are dropped by a mask from one place (see `noise`)."""
        return x


class LinearPath(Path):
    """nn.Linear; the weight is (out, in)."""

    @no_type_check
    def features(self, module: nn.Module) -> tuple[int, int]:
        rows, columns = cast(Tensor, module.weight).shape
        return rows, columns

    @no_type_check
    def matrix(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return cast(Tensor, module.weight)

    @no_type_check
    def shrink(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    @no_type_check
    def expand(self, module: nn.Module, hidden: Tensor, B: Tensor) -> Tensor:
        return F.linear(hidden, B)


class TransposedPath(LinearPath):
    """transformers' Conv1D: a linear layer whose weight is (in, out)."""

    @no_type_check
    def features(self, module: nn.Module) -> tuple[int, int]:
        rows, columns = cast(Tensor, module.weight).shape
        return columns, rows

    @no_type_check
    def matrix(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return cast(Tensor, module.weight).mT


class EmbeddingPath(TransposedPath):
    """nn.Embedding: a linear layer on one-hot inputs whose weight (in, out) is looked up.

    Some models scale what they have looked up (Gemma, BART): then the delta is scaled, too.
    """

    @no_type_check
    def expand(self, module: nn.Module, hidden: Tensor, B: Tensor) -> Tensor:
        return scaled_like(module, F.linear(hidden, B))

    @no_type_check
    def shrink(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        embedding = cast(nn.Embedding, module)
        return F.embedding(x, A.mT, embedding.padding_idx, None, 2.0, False, False)


@no_type_check
def scaled_like(module: nn.Module, rows: Tensor) -> Tensor:
    """Rows times what the embedding multiplies those by that it looks up."""
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


class ConvolutionPath(Path):
    """nn.Conv1d, 2d, 3d: A convolves as the base does, B mixes channels at each position.

    In a grouped convolution every group applies the same A to its own channels and its own rows
    of B, so that the delta is a kernel of the base's shape.
    """

    @no_type_check
    def features(self, module: nn.Module) -> tuple[int, int]:
        weight = cast(Tensor, module.weight)
        return weight.shape[0], math.prod(weight.shape[1:])

    @no_type_check
    def matrix(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return cast(Tensor, module.weight).flatten(1)

    @no_type_check
    def shrink(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        conv: Any = module
        kernel = A.view(A.shape[0], -1, *conv.kernel_size)
        if kernel.shape[1] != conv.weight.shape[1]:  # PEFT's form: A sees all groups' channels
            return _CONVOLVE[kernel.ndim - 3](x, kernel, None, conv.stride, conv.padding)
        if conv.groups > 1:
            kernel = kernel.repeat(conv.groups, *(1 for _ in kernel.shape[1:]))
        # the base's own method, so that padding modes are its own too
        return conv._conv_forward(x, kernel, None)

    @no_type_check
    def per_output(self, values: Float[Tensor, "out"], y: Tensor) -> Tensor:
        return values.view(-1, *(1 for _ in y.shape[2:]))

    @no_type_check
    def lines(self, x: Tensor) -> Tensor:
        return x.flatten(2)  # a channel of an image

    @no_type_check
    def expand(self, module: nn.Module, hidden: Tensor, B: Tensor) -> Tensor:
        conv: Any = module
        pointwise = B.view(*B.shape, *(1 for _ in conv.kernel_size))
        convolve = _CONVOLVE[len(conv.kernel_size) - 1]
        return convolve(hidden, pointwise, groups=conv.groups)


class AttentionPath(LinearPath):
    """nn.MultiheadAttention's packed projection: only its weight is read (see `attention`)."""

    @no_type_check
    def features(self, module: nn.Module) -> tuple[int, int]:
        rows, columns = cast(Tensor, module.in_proj_weight).shape
        return rows, columns

    @no_type_check
    def matrix(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return cast(Tensor, module.in_proj_weight)


LINEAR, TRANSPOSED, EMBEDDING = LinearPath(), TransposedPath(), EmbeddingPath()
CONVOLUTION, ATTENTION = ConvolutionPath(), AttentionPath()

_PATHS: tuple[tuple[type[nn.Module], Path, Kind], ...] = (
    (nn.Linear, LINEAR, "linear"),
    (Conv1D, TRANSPOSED, "linear"),
    (nn.Embedding, EMBEDDING, "embedding"),
    (nn.Conv1d, CONVOLUTION, "conv1d"),
    (nn.Conv2d, CONVOLUTION, "conv2d"),
    (nn.Conv3d, CONVOLUTION, "conv3d"),
    (nn.MultiheadAttention, ATTENTION, "attention"),
)


@no_type_check
def path_of(module: nn.Module) -> Path | None:
    """How a pair is applied to this module; None where no low-rank form is known."""
    path = next((path for kind, path, _ in _PATHS if isinstance(module, kind)), None)
    if path is ATTENTION and getattr(module, "in_proj_weight", None) is None:
        return None  # separate query, key and value weights of different sizes
    if path in (EMBEDDING, CONVOLUTION) and not _computes_plainly(module):
        return None  # positions that are computed inside, padding that depends on the input
    return path


_PLAIN_FORWARDS = tuple(c.forward for c in (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))


@no_type_check
def _computes_plainly(module: nn.Module) -> bool:
    """Whether the module's forward is its kind's own, but for the scale of an embedding."""
    forward = getattr(module, "base_class", type(module)).forward
    return forward in _PLAIN_FORWARDS or hasattr(module, "embed_scale")


def layer_of(module: nn.Module) -> Layer:
    """The `Layer` of a module that `path_of` knows."""
    kind: Kind = next(name for cls, _, name in _PATHS if isinstance(module, cls))
    kernel = getattr(module, "kernel_size", ()) if kind.startswith("conv") else ()
    return Layer(kind=kind, kernel=tuple(kernel))


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module."""
    packed = isinstance(module, nn.MultiheadAttention) and path_of(module) is not None
    return packed or isinstance(module, nn.Linear | Conv1D)


@no_type_check
def low_rank(
    module: nn.Module,
    path: Path,
    x: Shaped[Tensor, "rows *rest"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scale: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`scale * B (A x)`, shaped like the layer's output, computed in `dtype`.

    The scale (a number, or one a row) is applied to the thin hidden value. This is the one place
    where the formula stands.
    """
    hidden = path.shrink(module, x, A.to(dtype))
    if isinstance(scale, Tensor) or scale != 1:
        hidden = hidden * scale
    return path.expand(module, hidden, B.to(dtype))
