"""Batches whose tokens stand one after another, and the attention inside each of them.

Rotary positions (2104.09864) are turned into queries and keys first, on a GPU by room native. Short
rows on a CPU go through one call of room native, which keeps the projections alone; other attention
is `attention`'s.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loralab.fusion.attention import SHORT_ROW_TOKENS, Attended, Mask, attend, attend_backward
from loralab.native import training as native

Rows = Float[Tensor, "_ _"]
Heads = Float[Tensor, "batch _ _ head_size"]
Positions = Int[Tensor, "batch wanted"]


class Angles(NamedTuple):
    """Cosines and sines of the rotary positions."""

    cos: Float[Tensor, "_ tokens head_size"]
    sin: Float[Tensor, "_ tokens head_size"]


@dataclass(frozen=True)
class Piece:
    """A batch among the tokens that a block is given, which may be all of them.

    tokens: where they stand, row after row. wanted: the positions in each row that are computed
    beyond keys and values; None for all.
    """

    tokens: slice
    num_rows: int
    angles: Angles
    mask: Mask
    wanted: Positions | None = None

    @property
    def num_wanted(self) -> int:
        """How many of its tokens are computed to the end."""
        if self.wanted is None:
            return self.tokens.stop - self.tokens.start
        return self.wanted.numel()

    def batch(self, rows: Rows) -> Float[Tensor, "batch _ width"]:
        """Rows of the piece alone, as a batch."""
        return rows.view(self.num_rows, -1, rows.shape[-1])

    def heads(self, rows: Rows) -> Heads:
        """Rows of the piece alone, as heads."""
        return self.batch(rows).unflatten(-1, (-1, self.angles.cos.shape[-1])).transpose(1, 2)

    def attend(self, q: Rows, k: Rows, v: Rows) -> tuple[Rows, Attended]:
        """From the piece's projections to what the output layer reads."""
        kernel = self._kernel(q, k, v)
        if kernel is not None:
            return kernel.forward(), Attended(q, k, v, None, None)
        queries = take(self._rotated(q), self.wanted)
        keys = self._rotated(k)
        heads, attended = attend(queries, keys, self.heads(v).contiguous(), self.seen())
        return _rows_of_heads(heads), attended

    def attend_backward(self, g: Rows, attended: Attended) -> tuple[Rows, Rows, Rows]:
        """The gradients of the piece's q, k and v."""
        q, k, v, *_ = attended
        if q.ndim == 2:  # rows: the kernel's
            kernel = self._kernel(q, k, v)
            assert kernel is not None
            return kernel.backward(g.contiguous())
        grad_q, grad_k, grad_v = attend_backward(self.heads(g), attended)
        grad_q = put(grad_q, self.wanted, grad_k.shape[2])
        return self._rotated_back(grad_q), self._rotated_back(grad_k), _rows_of_heads(grad_v)

    def _rotated(self, rows: Rows) -> Heads:
        """The heads of these rows, with rotary positions."""
        if native.covers_rotation(rows, *self.angles):
            return self.heads(native.rotated(rows, *self.angles, back=False))
        return rotate(self.heads(rows), self.angles)

    def _rotated_back(self, g: Heads) -> Rows:
        """The gradient of the rows that `_rotated` was given."""
        rows = _rows_of_heads(g)
        if native.covers_rotation(rows, *self.angles):
            return native.rotated(rows, *self.angles, back=True)
        return _rows_of_heads(rotate_back(self.heads(rows), self.angles))

    def _kernel(self, q: Rows, k: Rows, v: Rows) -> native.Attention | None:
        """The attention of short rows by room native, where it is covered."""
        if self.angles.cos.shape[1] > SHORT_ROW_TOKENS:
            return None
        return native.attention((q, k, v), self.angles, self.mask, self.wanted)

    def seen(self) -> Mask:
        """The mask of the queries that are computed."""
        mask = self.mask
        if self.wanted is None:
            return mask
        if mask is None:
            num_tokens = self.angles.cos.shape[1]
            shape = num_tokens, num_tokens
            mask = torch.ones(shape, dtype=torch.bool, device=self.wanted.device).tril()[None, None]
        return take(mask.expand(self.num_rows, -1, -1, -1), self.wanted)


def take(values: Tensor, wanted: Positions | None) -> Tensor:
    """The wanted positions (the last dimension but one) of each row of the batch."""
    if wanted is None:
        return values
    return values.gather(-2, _spread(wanted, values))


def put(values: Tensor, wanted: Positions | None, num_tokens: int) -> Tensor:
    """The transpose of `take`: back to where they came from, zeros elsewhere."""
    if wanted is None:
        return values
    whole = values.new_zeros(*values.shape[:-2], num_tokens, values.shape[-1])
    return whole.scatter_(-2, _spread(wanted, values), values)


def _spread(wanted: Positions, values: Tensor) -> Tensor:
    """Positions as indices of every number that stands there."""
    shape = (wanted.shape[0], *(1 for _ in values.shape[1:-2]), wanted.shape[1], 1)
    return wanted.view(shape).expand(*values.shape[:-2], wanted.shape[1], values.shape[-1])


def rotate(heads: Heads, angles: Angles) -> Heads:
    """Rotary positions (2104.09864): the two halves of a head turn against each other."""
    half = heads.shape[-1] // 2
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


def rotate_back(g: Heads, angles: Angles) -> Heads:
    """The transpose of `rotate`."""
    half = g.shape[-1] // 2
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    turned = g * cos
    turned[..., :half].addcmul_(g[..., half:], sin[..., half:])
    turned[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
    return turned


def _rows_of_heads(heads: Heads) -> Rows:
    rows = heads.transpose(1, 2).flatten(2)
    return rows.reshape(-1, rows.shape[-1])
