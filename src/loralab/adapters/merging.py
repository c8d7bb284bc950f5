"""What a weight becomes when an adapter is added to it: fp32 sums, one rounding.

The same functions serve a model in memory, a model in place and a checkpoint on disk.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.layers import path_of
from loralab.adapters.mixing import some
from loralab.errors import AdapterError

ROW_ELEMENTS = 1 << 22  # of a block when a weight's error is measured: 32 MiB in fp64


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter does to the weight of one module, seen as a matrix (out, in)."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float
    magnitude: Float[Tensor, "out"] | None = None  # DoRA's

    def add(self, base: Float[Tensor, "out in"], out: Float[Tensor, "out in"]) -> None:
        """Writes the adapted weight to `out`, summed in its dtype: a product, then one addition."""
        out.copy_(base)
        out.addmm_(self.B.to(out), self.A.to(out), alpha=self.scale)
        if self.magnitude is not None:
            norms = torch.linalg.vector_norm(out, dim=1)
            out *= (self.magnitude.to(out) / norms)[:, None]

    def rows(self, start: int, stop: int) -> "Change":
        """The change of the rows `start:stop` alone."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return Change(self.A, self.B[start:stop], self.scale, magnitude=magnitude)

    def columns(self, start: int, stop: int) -> "Change":
        """The change of the columns `start:stop` alone. Not for DoRA."""
        return Change(self.A[:, start:stop], self.B, self.scale)


def check_mergeable(adapter: Adapter) -> None:
    """Raises `AdapterError` that names every module whose delta is no weight of its layer."""
    mixing = [path for path in adapter.pairs if adapter.layer(path).groups > 1]
    if mixing:
        raise AdapterError(
            f"{some(mixing)}: A sees the channels of all groups (as PEFT trains it), which the"
            " kernel of a grouped convolution cannot",
            "keep the adapter separate (`loralab.use`).",
        )


def change_at(adapter: Adapter, module: str, device: torch.device | str = "cpu") -> Change:
    """The change that the adapter makes at a module."""
    A, B = adapter.pairs[module]
    magnitude = adapter.magnitudes.get(module)
    return Change(
        A=A.to(device),
        B=B.to(device),
        scale=adapter.scale(module),
        magnitude=None if magnitude is None else magnitude.flatten().to(device),
    )


def matrix_view(module: nn.Module, values: Tensor, like: Tensor) -> Float[Tensor, "out in"]:
    """`values`, shaped and laid out as the module's weight `like`, as its matrix (a view)."""
    path = path_of(module)
    if path is None:
        raise AdapterError(
            f"a {type(module).__name__} has no low-rank form", "leave that module out."
        )
    matrix = path.matrix(module)
    offset = matrix.storage_offset() - like.storage_offset()
    return values.as_strided(matrix.shape, matrix.stride(), values.storage_offset() + offset)


def merged_weight(module: nn.Module, weight: Tensor, change: Change) -> Tensor:
    """The weight of a module with the change added in fp32, rounded once to the weight's dtype.

    weight: the module's own parameter that `path_of(module).matrix` is a view of.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device)
    change.add(matrix_view(module, weight, weight), matrix_view(module, total, weight))
    return total.to(weight.dtype)


def weight_name(module: nn.Module) -> str:
    """The name, inside its module, of the parameter that a pair changes."""
    path = path_of(module)
    matrix = None if path is None else path.matrix(module)
    for name, parameter in module.named_parameters(recurse=False):
        if matrix is not None and matrix.untyped_storage().data_ptr() == _place(parameter):
            return name
    return "weight"


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class WeightError:
    """How far merged weights are from `W + delta`, in squared Frobenius norms and counts."""

    squared_error: float = 0.0
    squared_delta: float = 0.0
    num_unchanged: int = 0
    num_weights: int = 0

    def __add__(self, other: "WeightError") -> "WeightError":
        return WeightError(
            self.squared_error + other.squared_error,
            self.squared_delta + other.squared_delta,
            self.num_unchanged + other.num_unchanged,
            self.num_weights + other.num_weights,
        )

    @property
    def relative(self) -> float:
        """`||merged - (W + delta)|| / ||delta||`; 0 where there is no delta."""
        if self.squared_delta == 0:
            return 0.0
        return (self.squared_error / self.squared_delta) ** 0.5

    @property
    def unchanged_share(self) -> float:
        """The share of the adapted weights whose bits the merge left as they were."""
        return self.num_unchanged / self.num_weights if self.num_weights else 0.0


def weight_error(
    base: Float[Tensor, "out in"], merged: Float[Tensor, "out in"], change: Change
) -> WeightError:
    """What rounding cost one weight, block by block: in fp64 for an fp32 base, else in fp32."""
    dtype = torch.float64 if base.dtype.itemsize >= 4 else torch.float32
    exact = Change(change.A.to(dtype), change.B.to(dtype), change.scale, change.magnitude)
    found = WeightError()
    height = max(1, ROW_ELEMENTS // base.shape[1])
    for start in range(0, base.shape[0], height):
        rows = slice(start, min(start + height, base.shape[0]))
        old, new = base[rows].to(dtype), merged[rows].to(dtype)
        wanted = torch.empty_like(old)
        exact.rows(rows.start, rows.stop).add(old, wanted)
        found += WeightError(
            squared_error=_squared(new - wanted),
            squared_delta=_squared(wanted - old),
            num_unchanged=int((new == old).sum()),
            num_weights=new.numel(),
        )
    return found


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
