"""Dropout whose masks are never kept: a window into a fixed table of coin flips for each row.

A generator's mask costs more time than the low-rank product it serves, and keeping it costs as much
memory as the input. Here each row of the input gets a random place in a table of half a million
flips (small enough for a core's cache), drawn from torch's generator; the row's mask is what
follows that place. Eight bytes a row bring the mask back in the backward pass. Every entry is
dropped with the wanted probability, and rows, layers and steps have places of their own.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import no_type_check

import torch
from jaxtyping import Float, Int, Shaped
from torch import Generator, Tensor
from torch._guards import active_fake_mode

NUM_FLIPS = 1 << 19
_SEED = 0x10AA

Places = Int[Tensor, " rows"]

_NONE: Mapping[str, Generator] = MappingProxyType({})
_streams: ContextVar[Mapping[str, Generator]] = ContextVar("streams of adapters", default=_NONE)


@contextmanager
def streams(generators: Mapping[str, Generator]) -> Iterator[None]:
    """Inside, the masks of an adapter's rows are drawn from its own generator, where it has one."""
    token = _streams.set(generators)
    try:
        yield
    finally:
        _streams.reset(token)


def stream_of(name: str) -> Generator | None:
    """The generator that the adapter's masks are drawn from; None for the device's own."""
    return _streams.get().get(name)


@no_type_check
def draw_places(x: Float[Tensor, "*rows width"], stream: Generator | None = None) -> Places:
    """A random place in the table for each row of `x`, from `stream` or its device's generator."""
    width = x.shape[-1]
    num_rows = x.numel() // max(1, width)
    highest = num_flips(width) - width + 1
    if stream is None:  # compilers know a generator only where it goes without saying
        return torch.randint(highest, (num_rows,), device=x.device)
    return torch.randint(highest, (num_rows,), generator=stream, device=x.device)


@no_type_check
def mask_at(
    x: Float[Tensor, "*rows width"], places: Places, dropout: float | int
) -> Float[Tensor, "*rows width"]:
    """The mask of `x`, from the flips at its rows' places: 1 to keep, 0 to drop; not scaled.

    An entry is dropped with probability `dropout`, to 1 in 65,536.
    """
    flips = table(x.shape[-1], dropout, x.dtype, x.device)
    return flips.unfold(0, x.shape[-1], 1).index_select(0, places).view(x.shape)


@no_type_check
def kept(
    x: Float[Tensor, "*rows width"], places: Places, dropout: float | int
) -> Float[Tensor, "*rows width"]:
    """`x` where its mask says keep, else 0."""
    if torch.compiler.is_compiling():
        return opaque_mask(x.detach(), places, float(dropout)) * x
    return mask_at(x, places, dropout).mul_(x)


@torch.library.custom_op("loralab::mask_at", mutates_args=())
def opaque_mask(x: Tensor, places: Tensor, dropout: float) -> Tensor:
    """`mask_at` for compiled code, which must not trace the making of the table."""
    return mask_at(x, places, dropout)


@opaque_mask.register_fake
def _(x: Tensor, places: Tensor, dropout: float) -> Tensor:
    return torch.empty_like(x)


def num_flips(width: int) -> int:
    """How many flips the table for rows of `width` has: room for at least `width` other places."""
    return max(NUM_FLIPS, 2 * width)


def table(
    width: int, dropout: float | int, dtype: torch.dtype, device: torch.device
) -> Shaped[Tensor, " flips"]:
    """The flips that rows of `width` are masked by, made at the first call; a process keeps it."""
    return _table(num_flips(width), dropout, dtype, device, active_fake_mode())


@functools.lru_cache(maxsize=8)
def _table(
    count: int, dropout: float | int, dtype: torch.dtype, device: torch.device, _mode: object
) -> Tensor:
    """1 with probability `1 - dropout`, else 0; the same flips on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    words = torch.randint(1 << 16, (count,), generator=generator, dtype=torch.int32)
    return (words >= round(dropout * (1 << 16))).to(device, dtype)
