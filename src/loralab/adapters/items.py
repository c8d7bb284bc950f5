"""What a module hosts of one adapter: a factor pair, rows of an embedding, or tensors of its own.

All parameters are fp32, whatever the base's dtype; they compute in the dtype of the layer's output.
"""

from typing import Any, cast, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loralab.adapters.adapter import Layer
from loralab.adapters.layers import Path, low_rank, scaled_like
from loralab.adapters.noise import draw_places, kept

_NEW_MODULE = nn.Module().__dict__
_TABLES = {name: value.copy for name, value in _NEW_MODULE.items() if hasattr(value, "copy")}


def _fresh_tables() -> dict[str, Any]:
    """What `nn.Module.__init__` sets up, at an eighth of its cost."""
    return {**_NEW_MODULE, **{name: copy() for name, copy in _TABLES.items()}}


class Pair(nn.Module):
    """A and B, and where the adapter trains them DoRA's magnitude and the module's bias.

    start: the first A and B of an initialiser that moves the base. They are taken off again here,
    `s (B A - B_0 A_0)`, so that the base itself stays untouched and shared.
    """

    def __init__(
        self,
        A: Float[Tensor, "rank in"],
        B: Float[Tensor, "out _"],
        scale: float,
        dropout: float | int = 0.0,
        layer: Layer | None = None,
        magnitude: Float[Tensor, "out"] | None = None,
        bias: Float[Tensor, "out"] | None = None,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        # straight into the tables: hundreds of pairs are made when an adapter is loaded
        tables = _fresh_tables()
        tables["_parameters"].update(
            A=nn.Parameter(A),
            B=nn.Parameter(B),
            magnitude=None if magnitude is None else nn.Parameter(magnitude),
            bias=None if bias is None else nn.Parameter(bias),
        )
        first_A, first_B = (None, None) if start is None else start
        tables["_buffers"].update(first_A=first_A, first_B=first_B)
        tables["_non_persistent_buffers_set"].update(("first_A", "first_B"))
        tables.update(scale=scale, dropout=dropout, layer=layer or Layer())
        self.__dict__.update(tables)

    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    first_A: Tensor | None  # noqa: N815  (A and B are the factors' names)
    first_B: Tensor | None  # noqa: N815
    scale: float
    dropout: float | int
    layer: Layer

    @no_type_check
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole delta on the untouched base; the rank doubles where it was moved."""
        if self.first_A is None or self.first_B is None:
            return self.A, self.B
        return torch.cat([self.A, self.first_A]), torch.cat([self.B, -self.first_B], dim=1)

    @no_type_check
    def delta(
        self, module: nn.Module, path: Path, x: Tensor, y: Tensor, weight: float | Tensor
    ) -> Tensor:
        """What is added to `y`, the base's output for `x`, times a weight (or one a row).

        With a magnitude m (DoRA, 2402.09353, equation 5; the norm is a constant in the gradient):
        `m / ||W + s B A|| (W x + s B A x) - W x`.
        """
        if self.drops(x):
            lines = path.lines(x)
            x = kept(lines, draw_places(lines), self.dropout).view(x.shape) / (1 - self.dropout)
        A, B = self.factors()
        if self.magnitude is None:
            return low_rank(module, path, x, A, B, self.scale * weight, y.dtype)
        learnt = low_rank(module, path, x, A, B, self.scale, y.dtype)
        norm = weight_norm(path.matrix(module), A, B, self.scale)
        ratio = path.per_output((self.magnitude / norm).to(y.dtype), y)
        bias = self.bias if self.bias is not None else getattr(module, "bias", None)
        if bias is not None:
            y = y - path.per_output(bias.to(y.dtype), y)
        return weight * ((ratio - 1) * y + ratio * learnt)

    @no_type_check
    def drops(self, x: Tensor) -> bool:
        """Whether entries of the input `x` are dropped."""
        return bool(self.dropout) and self.training and x.is_floating_point()

    def extra_repr(self) -> str:
        rank, columns = self.A.shape
        return f"{columns} -> {rank} -> {self.B.shape[0]}, scale={self.scale:g}"


@no_type_check
def weight_norm(
    weight: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scale: float,
) -> Float[Tensor, "out"]:
    """`||W + s B A||` of each row, in fp32, without the sum: |w|^2 + 2 s w A'b + s^2 b'A A'b."""
    with torch.no_grad():
        own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        cross = ((weight @ A.to(weight.dtype).mT).float() * B).sum(1)
        learnt = ((B @ (A @ A.mT)) * B).sum(1)
        return (own + 2 * scale * cross + scale**2 * learnt).clamp_min(1e-30).sqrt()


class Rows(nn.Module):
    """Rows of an embedding that the adapter puts in the place of the base's (new tokens).

    tied: the rows of another module whose weight is the same tensor, such as an output layer, where
    they make the logits.
    """

    indices: Tensor

    def __init__(
        self,
        indices: Int[Tensor, "num_rows"],
        rows: Float[Tensor, "num_rows dim"],
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tied = tied
        self.rows = nn.Parameter(rows)
        self.register_buffer("indices", indices, persistent=False)

    @no_type_check
    def delta(
        self, module: nn.Module, path: Path, x: Tensor, y: Tensor, weight: float | Tensor
    ) -> Tensor:
        """What is added to `y`, the base's output for `x`, times a weight (or one a row)."""
        table = cast(Tensor, module.weight)
        change = self.rows.to(y.dtype) - table[self.indices].to(y.dtype)
        if not isinstance(module, nn.Embedding):
            logits = F.linear(x, change)
            return weight * torch.zeros_like(y).index_add(-1, self.indices, logits)
        order = self.indices.argsort()
        sorted_indices = self.indices[order]
        place = torch.searchsorted(sorted_indices, x.contiguous()).clamp_max(len(order) - 1)
        hit = sorted_indices[place] == x
        found = scaled_like(module, change[order])[place]
        return weight * torch.where(hit[..., None], found, torch.zeros_like(y))

    def extra_repr(self) -> str:
        return f"{len(self.indices)} rows"


class Own(nn.Module):
    """Some of a module's parameters, which the adapter replaces by its own (biases)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def is_additive(item: nn.Module | None) -> bool:
    """Whether the item adds to the module's output and leaves its tensors as they are."""
    return isinstance(item, Rows) or (isinstance(item, Pair) and item.bias is None)


def replacements(item: nn.Module) -> dict[str, Tensor]:
    """The module's tensors that the item puts its own in the place of."""
    if isinstance(item, Pair):
        return {} if item.bias is None else {"bias": item.bias}
    if isinstance(item, Rows):
        return {}
    return {**dict(item.named_parameters()), **dict(item.named_buffers())}


@no_type_check
def as_addition(item: Any) -> Pair | Rows | None:
    """The item, where it adds to the module's output."""
    return item if isinstance(item, Pair | Rows) else None
