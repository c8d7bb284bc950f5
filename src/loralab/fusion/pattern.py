"""Finding blocks that `block` has the formula of: by what they do in one forward, not by name.

Which layers read the same tensor, and whose output that is, tells their roles. Whether the rest of
the block (positions, masks, scalings, residuals) is the formula's is then tried: the fused forward
must give what the block gave. A block that fails stays as it is.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import Member, base_member, share
from loralab.errors import ModelError
from loralab.fusion.attention import Mask
from loralab.fusion.block import Block, block_forward
from loralab.fusion.gates import Gate, gate_of
from loralab.fusion.norms import HeadNorm, Norm, Norms, norm_of
from loralab.fusion.pieces import Angles, Piece, Positions
from loralab.fusion.proof import agrees
from loralab.fusion.watching import Leaf, Seen, own_modules, watch
from loralab.models import blocks, evaluating


@dataclass(frozen=True)
class Parts:
    """The modules of a block by their roles in the formula.

    linears: by the input they read, (queries, keys, values), (output,), (gate, up), (down,).
    """

    norms: tuple[nn.Module, ...]
    activation: nn.Module
    linears: tuple[tuple[nn.Module, ...], ...]


@dataclass(frozen=True)
class Matched:
    """A block that the formula was found to hold for."""

    module: nn.Module
    inner: tuple[nn.Module, ...]  # its own, without what they host of adapters
    parts: Parts
    norms: Norms
    gate: Gate
    is_last: bool  # of the model's blocks, all of which match

    def block(self, members: Sequence[Sequence[Member]]) -> tuple[Block, list[Tensor]] | None:
        """The formula with its linear layers as `members`, and the factors of their pairs.

        None where layers that read the same input have different dropouts.
        """
        shared = [each for group in members if (each := share(group)) is not None]
        if len(shared) < len(members):
            return None
        of_qkv, of_output, of_gate_up, of_down = (inputs for inputs, _ in shared)
        block = Block(
            norms=self.norms,
            queries_keys_values=of_qkv,
            output=of_output,
            gate_up=of_gate_up,
            down=of_down,
            gate=self.gate,
        )
        return block, [factor for _, factors in shared for factor in factors]


@dataclass(frozen=True)
class Call:
    """What a block is called with, as far as the formula knows it."""

    x: Float[Tensor, "batch tokens width"]
    angles: Angles
    mask: Mask

    def piece(self, start: int = 0, wanted: Positions | None = None) -> Piece:
        """The call as a piece whose first token stands at `start`."""
        num_rows, num_tokens, _ = self.x.shape
        tokens = slice(start, start + num_rows * num_tokens)
        return Piece(tokens, num_rows, self.angles, self.mask, wanted)


def matching_blocks(model: nn.Module) -> list[Matched]:
    """The model's blocks for which the formula holds; none where the model has no such thing.

    Costs two forwards of a few tokens.
    """
    try:
        _, layers = blocks(model)
    except ModelError:
        return []
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return []
    if not hasattr(model, "get_input_embeddings"):  # a module of the user's own
        return []
    with evaluating(model), torch.no_grad():
        trials = watch(model, layers)
        seen = {layer: [trial[layer] for trial in trials if layer in trial] for layer in layers}
        found = [_match(layer, calls) for layer, calls in seen.items() if len(calls) == len(trials)]
    matched = [match for match in found if match is not None]
    if len(matched) == len(layers):
        matched[-1] = replace(matched[-1], is_last=True)
    return matched


def read_call(args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
    """A block's arguments as a `Call`; None where there are others than the formula knows."""
    x = args[0] if args else kwargs.get("hidden_states")
    mask, angles = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    if len(args) > 1 or kwargs.get("past_key_values") is not None:
        return None
    if not isinstance(x, Tensor) or x.ndim != 3 or not isinstance(angles, tuple):
        return None
    if len(angles) != 2 or not all(isinstance(a, Tensor) and a.ndim == 3 for a in angles):
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        return None
    return Call(x, Angles(*angles), mask)


def _match(layer: nn.Module, seen: Sequence[Seen]) -> Matched | None:
    roles = _roles(seen[0].leaves)
    calls = [call for each in seen if (call := read_call(each.args, each.kwargs)) is not None]
    if roles is None or len(calls) < len(seen) or _drops(layer):
        return None
    parts, norms = roles
    members = [[m for module in group if (m := base_member(module))] for group in parts.linears]
    if not _fits_heads(members[0], calls[0].angles):
        return None
    inner = tuple(module for module in own_modules(layer) if module is not layer)
    found = Matched(layer, inner, parts, norms, gate_of(parts.activation), is_last=False)
    built = found.block(members)
    if built is None:
        return None
    for call, each in zip(calls, seen, strict=True):
        rows, _ = block_forward(call.x.flatten(0, 1), built[0], [call.piece()], [])
        got = rows.view(call.x.shape)
        if not isinstance(each.output, Tensor) or not agrees(got - call.x, each.output - call.x):
            return None
    return found


def _roles(leaves: Sequence[Leaf]) -> tuple[Parts, Norms] | None:
    """Who is who, by which leaf reads whose output."""
    linears = [leaf for leaf in leaves if base_member(leaf.module) is not None]
    others = [leaf for leaf in leaves if base_member(leaf.module) is None]
    groups: list[list[Leaf]] = []
    for leaf in linears:
        same = next((group for group in groups if group[0].read is leaf.read), None)
        groups.append([leaf]) if same is None else same.append(leaf)
    if [len(group) for group in groups] != [3, 1, 2, 1]:
        return None
    of_qkv, (output,), of_gate_up, (down,) = groups
    gate, activation = _fed(of_gate_up, others)
    if gate is None or activation is None:
        return None
    up = next(leaf for leaf in of_gate_up if leaf is not gate)
    norms = {
        "attention": _fed(others, of_qkv)[0],
        "mlp": _fed(others, of_gate_up)[0],
        "queries": _fed(of_qkv[:1], others)[1],
        "keys": _fed(of_qkv[1:2], others)[1],
        "attended": _fed([output], others)[1],
        "mapped": _fed([down], others)[1],
    }
    known = {role: leaf for role, leaf in norms.items() if leaf is not None}
    if not {"attention", "mlp"} <= known.keys() or len(known) + 1 != len(others):
        return None
    parts = Parts(
        norms=tuple(leaf.module for leaf in known.values()),
        activation=activation.module,
        linears=tuple(
            tuple(leaf.module for leaf in group) for group in (of_qkv, [output], [gate, up], [down])
        ),
    )
    heads = {"queries": of_qkv[0], "keys": of_qkv[1]}
    return parts, Norms(**{role: _norm(leaf, heads.get(role)) for role, leaf in known.items()})


def _norm(leaf: Leaf, projection: Leaf | None) -> Norm:
    """The norm that the leaf is: of whole rows, or of each head of a projection's rows."""
    width = leaf.read.shape[-1]
    norm = norm_of(leaf.module, leaf.read.reshape(-1, width))
    if projection is None or width == projection.gave.shape[-1]:
        return norm
    return HeadNorm(norm, width)


def _fed(first: Sequence[Leaf], then: Sequence[Leaf]) -> tuple[Leaf, Leaf] | tuple[None, None]:
    """A leaf of `first` and the one of `then` that reads its output, maybe as heads."""
    pairs = ((a, b) for a in first for b in then if _is_view(b.read, a.gave))
    return next(pairs, (None, None))


def _is_view(read: Any, gave: Any) -> bool:
    """Whether `read` has all numbers of `gave` and is the same memory."""
    if not isinstance(read, Tensor) or not isinstance(gave, Tensor):
        return False
    same = read.untyped_storage()._cdata == gave.untyped_storage()._cdata
    return same and read.storage_offset() == gave.storage_offset() and read.numel() == gave.numel()


def _fits_heads(members: Sequence[Member], angles: Angles) -> bool:
    """Whether queries, keys and values are whole heads of the angles' size."""
    q, k, v = (member.weight.shape[0] for member in members)
    head_size = angles.cos.shape[-1]
    return q % head_size == k % head_size == 0 and k == v and q % k == 0


def _drops(layer: nn.Module) -> bool:
    for module in own_modules(layer):
        rates = [value for name, value in vars(module).items() if "dropout" in name]
        rates += [module.p] if isinstance(module, nn.Dropout) else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False
