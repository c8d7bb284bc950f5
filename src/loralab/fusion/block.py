"""A pre-norm block with rotary attention and a gated MLP as one autograd function.

    n = norm(x)      a = attention(rotary(Q n), rotary(K n), V n)     h = x + O a
    m = norm(h)      y = h + Down(act(Gate m) * Up m)

Q ... Down are frozen linear layers, each with a low-rank pair or without. Some models have norms of
Q n, K n, O a and Down(...) as well. Kept for the backward pass: x, h, the queries, keys and values,
the attention output, and the outputs of Gate and Up (and what those further norms read, and the
attention weights, where no kernel makes them again). Run again there: the norms, act, the gated
product, the dropout masks and the thin products; none of them is a large matrix product.

The tokens of several batches may be given one after another, as pieces: only attention, which looks
at several tokens, is done piece by piece.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralab.adapters import EVERY_ROW, SharedInput, draw_mask, project, project_backward
from loralab.fusion.attention import Attended
from loralab.fusion.gates import Gate
from loralab.fusion.norms import Norms, normed, normed_backward
from loralab.fusion.pieces import Piece, Rows, put, take


@dataclass(frozen=True)
class Block:
    """The layers of one block for one forward."""

    norms: Norms
    queries_keys_values: SharedInput
    output: SharedInput
    gate_up: SharedInput
    down: SharedInput
    gate: Gate

    @property
    def inputs(self) -> tuple[SharedInput, SharedInput, SharedInput, SharedInput]:
        """The four inputs that linear layers read, in order."""
        return self.queries_keys_values, self.output, self.gate_up, self.down

    def split(self, factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """`A, B` of all pairs in a row, as those of each of `inputs`."""
        parts, at = [], 0
        for shared in self.inputs:
            parts.append(factors[at : at + shared.num_factors])
            at += shared.num_factors
        return parts


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs beside `x` and the factors.

    What the norms read that only some models have is None in the others.
    """

    attended: tuple[Attended, ...]  # of each piece
    attention: Rows
    h: Rows
    gate: Rows
    up: Rows
    queries: Rows | None
    keys: Rows | None
    added: Rows | None  # by attention
    mapped: Rows | None  # by the MLP
    places: tuple[Tensor | None, ...]  # of the dropout masks of `Block.inputs`

    NUM_ROWS: ClassVar[int] = 8
    NUM_OTHERS: ClassVar[int] = 12
    NUM_ATTENDED: ClassVar[int] = 5

    def tensors(self) -> list[Tensor | None]:
        """All of them in a row, as autograd keeps them."""
        attended = [tensor for each in self.attended for tensor in each]
        rows = [self.attention, self.h, self.gate, self.up]
        normed = [self.queries, self.keys, self.added, self.mapped]
        return [*rows, *normed, *self.places, *attended]

    @classmethod
    def num_tensors(cls, num_pieces: int) -> int:
        """How many `tensors` gives."""
        return cls.NUM_OTHERS + num_pieces * cls.NUM_ATTENDED

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> "Kept":
        """The other way round."""
        rows, places = tensors[: cls.NUM_ROWS], tensors[cls.NUM_ROWS : cls.NUM_OTHERS]
        starts = range(cls.NUM_OTHERS, len(tensors), cls.NUM_ATTENDED)
        attended = tuple(Attended(*tensors[at : at + cls.NUM_ATTENDED]) for at in starts)
        return Kept(attended, *rows, places=tuple(places))


def block_forward(
    x: Float[Tensor, "tokens width"],
    block: Block,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
) -> tuple[Float[Tensor, "tokens width"], Kept]:
    """The block's output, and what its backward pass needs.

    Where positions are wanted only these are computed beyond keys and values; others are zero.
    """
    block, norms = _of_wanted(block, pieces), block.norms
    of_qkv, of_output, of_gate_up, of_down = block.split(factors)

    n, _ = norms.attention.forward(x)
    qkv_places = draw_mask(n, block.queries_keys_values)
    q, k, v = project(n, block.queries_keys_values, of_qkv, qkv_places)
    q, queries = normed(norms.queries, q)
    k, keys = normed(norms.keys, k)
    found = [piece.attend(*(each[piece.tokens] for each in (q, k, v))) for piece in pieces]
    attention = _joined([rows for rows, _ in found])
    output_places = draw_mask(attention, block.output)
    h, added = normed(norms.attended, project(attention, block.output, of_output, output_places)[0])
    h = h.add_(_taken(x, pieces))

    m, _ = norms.mlp.forward(h)
    gate_up_places = draw_mask(m, block.gate_up)
    gate, up = project(m, block.gate_up, of_gate_up, gate_up_places)
    gated = block.gate.forward(gate, up)
    down_places = draw_mask(gated, block.down)
    y, mapped = normed(norms.mapped, project(gated, block.down, of_down, down_places)[0])
    y = y.add_(h)

    places = (qkv_places, output_places, gate_up_places, down_places)
    attended = tuple(attended for _, attended in found)
    kept = Kept(attended, attention, h, gate, up, queries, keys, added, mapped, places)
    return _put_back(y, pieces), kept


def block_backward(
    g: Float[Tensor, "tokens width"],
    x: Float[Tensor, "tokens width"],
    block: Block,
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    kept: Kept,
    *,
    wants_input: bool,
) -> tuple[Float[Tensor, "tokens width"] | None, list[Tensor]]:
    """The gradients of `x` (None where unwanted) and of the factors."""
    block, norms = _of_wanted(block, pieces), block.norms
    of_qkv, of_output, of_gate_up, of_down = block.split(factors)
    qkv_places, output_places, gate_up_places, down_places = kept.places
    grad_y = _taken(g, pieces)

    gated = block.gate.forward(kept.gate, kept.up)
    grad_mapped = normed_backward(norms.mapped, grad_y, kept.mapped)
    grad_gated, grad_down = project_backward([grad_mapped], gated, block.down, of_down, down_places)
    assert grad_gated is not None
    grad_gate, grad_up = block.gate.backward(grad_gated, kept.gate, kept.up)
    m, scales_h = norms.mlp.forward(kept.h)
    grad_m, grad_gate_up = project_backward(
        [grad_gate, grad_up], m, block.gate_up, of_gate_up, gate_up_places
    )
    assert grad_m is not None
    grad_h = norms.mlp.backward(grad_m, kept.h, scales_h, grad_y)

    grad_added = normed_backward(norms.attended, grad_h, kept.added)
    grad_attention, grad_output = project_backward(
        [grad_added], kept.attention, block.output, of_output, output_places
    )
    assert grad_attention is not None
    by_piece = grad_attention.split([piece.num_wanted for piece in pieces])
    found = [
        piece.attend_backward(own, attended)
        for piece, own, attended in zip(pieces, by_piece, kept.attended, strict=True)
    ]
    grad_q, grad_k, grad_v = (_joined(each) for each in zip(*found, strict=True))
    grad_q = normed_backward(norms.queries, grad_q, kept.queries)
    grad_k = normed_backward(norms.keys, grad_k, kept.keys)
    n, scales_x = norms.attention.forward(x)
    grad_n, grad_factors = project_backward(
        [grad_q, grad_k, grad_v],
        n,
        block.queries_keys_values,
        of_qkv,
        qkv_places,
        wants_input=wants_input,
    )
    grad_factors = [*grad_factors, *grad_output, *grad_gate_up, *grad_down]
    if grad_n is None:
        return None, grad_factors
    beside = _put_back(grad_h, pieces)
    return norms.attention.backward(grad_n, x, scales_x, beside), grad_factors


def _of_wanted(block: Block, pieces: Sequence[Piece]) -> Block:
    """The block whose layers above attention read the wanted tokens alone."""
    if all(piece.wanted is None for piece in pieces):
        return block
    stops = list(itertools.accumulate(piece.num_wanted for piece in pieces))
    moved = {
        piece.tokens.start: slice(stop - piece.num_wanted, stop)
        for piece, stop in zip(pieces, stops, strict=True)
    }

    def move(shared: SharedInput) -> SharedInput:
        parts = (
            part if part.rows == EVERY_ROW else replace(part, rows=moved[part.rows.start])
            for part in shared.parts
        )
        return replace(shared, parts=tuple(parts))

    above = {name: move(getattr(block, name)) for name in ("output", "gate_up", "down")}
    return replace(block, **above)


def _taken(rows: Rows, pieces: Sequence[Piece]) -> Rows:
    """The wanted tokens of all pieces."""
    if all(piece.wanted is None for piece in pieces):
        return rows
    return _joined([_rows(take(p.batch(rows[p.tokens]), p.wanted)) for p in pieces])


def _put_back(rows: Rows, pieces: Sequence[Piece]) -> Rows:
    """The transpose of `_taken`: zeros where nothing was wanted."""
    if all(piece.wanted is None for piece in pieces):
        return rows
    split = zip(pieces, rows.split([piece.num_wanted for piece in pieces]), strict=True)
    return _joined([_rows(put(p.batch(own), p.wanted, p.angles.cos.shape[1])) for p, own in split])


def _joined(rows: Sequence[Rows]) -> Rows:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


class BlockStep(torch.autograd.Function):
    """`block_forward` with `block_backward` as its gradient."""

    @staticmethod
    @no_type_check
    def forward(ctx: Any, x: Tensor, block: Block, pieces: Sequence[Piece], *factors: Tensor):
        y, kept = block_forward(x, block, pieces, factors)
        ctx.block, ctx.pieces = block, pieces
        ctx.save_for_backward(x, *kept.tensors(), *factors)
        return y

    @staticmethod
    @once_differentiable
    @no_type_check
    def backward(ctx: Any, g: Tensor):
        x, *saved = ctx.saved_tensors
        num_kept = Kept.num_tensors(len(ctx.pieces))
        kept, factors = Kept.of(saved[:num_kept]), saved[num_kept:]
        wants_input = ctx.needs_input_grad[0]
        grad_x, grad_factors = block_backward(
            g, x, ctx.block, ctx.pieces, factors, kept, wants_input=wants_input
        )
        return grad_x, None, None, *grad_factors


def _rows(x: Float[Tensor, "batch _ _"]) -> Rows:
    return x.reshape(-1, x.shape[-1])
