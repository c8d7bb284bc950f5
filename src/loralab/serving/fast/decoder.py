"""A causal model as the numbers a decoding step needs, found by structure and proved by trial.

    x = Embedding(ids)    each block: see `fusion.block`    logits = Output norm(x)

`find_decoder` gives a `Decoder`, or says in words why the formula does not cover the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import base_member
from loralab.fusion import Matched, RMSNorm, agrees, frozen_output_layer, matching_blocks, norm_of
from loralab.models import evaluating

_POSITIONS_AT_ONCE = 256
"""A mask of so many positions is small in every form of it."""

_NAMES = ("silu", "gelu", "gelu_tanh")
_ACTIVATIONS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"))


@dataclass(frozen=True)
class Projection:
    """A linear layer of a block; its weight is read from the module when it is needed."""

    module: nn.Module
    input: int  # which of the block's four inputs it reads: 0 of qkv, 1 of output, 2, 3 of down

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """(out, in), the base's own tensor."""
        member = base_member(self.module)
        assert member is not None
        return member.weight

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        member = base_member(self.module)
        return None if member is None else member.bias


@dataclass(frozen=True)
class DecoderBlock:
    """projections: queries, keys, values, output, gate, up, down."""

    attention_norm: RMSNorm
    mlp_norm: RMSNorm
    projections: tuple[Projection, ...]


@dataclass(frozen=True)
class Decoder:
    """What a decoding step reads. cos, sin: (max_tokens, head_size) of the rotary positions.

    activation: its number in `ACTIVATIONS`, the order that the kernel knows.
    """

    embedding: nn.Embedding
    blocks: tuple[DecoderBlock, ...]
    final_norm: RMSNorm
    output: nn.Linear
    cos: Float[Tensor, "max_tokens head_size"]
    sin: Float[Tensor, "max_tokens head_size"]
    activation: int

    @property
    def head_size(self) -> int:
        return self.cos.shape[1]

    @property
    def num_heads(self) -> int:
        return self.blocks[0].projections[0].weight.shape[0] // self.head_size

    @property
    def num_kv_heads(self) -> int:
        return self.blocks[0].projections[1].weight.shape[0] // self.head_size

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.output.weight.device


class _NotCoveredError(Exception):
    """The formula does not cover the model; the message says why."""


class _ReachedError(Exception):
    """Not an error: it ends a forward at the first block, with what that was given."""

    def __init__(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.x, self.angles = x, angles


def activate(number: int, x: Tensor) -> Tensor:
    """The activation of that number."""
    return _ACTIVATIONS[number](x)


@torch.no_grad()
def find_decoder(model: nn.Module, max_tokens: int) -> Decoder | str:
    """The model as a `Decoder` of up to `max_tokens` positions, or the reason why it is none.

    The base must be frozen. Costs a few forwards of a few tokens.
    """
    try:
        with evaluating(model):
            return _find(model, max_tokens)
    except _NotCoveredError as reason:
        return str(reason)


def _find(model: nn.Module, max_tokens: int) -> Decoder:
    _check_settings(getattr(model, "config", None), max_tokens)
    matched = matching_blocks(model)
    if not matched or not matched[-1].is_last:
        raise _NotCoveredError("its blocks are not pre-norm, rotary and gated")
    output = frozen_output_layer(model)
    embedding = cast(Any, model).get_input_embeddings()
    if output is None:
        raise _NotCoveredError("its logits are not those of a frozen linear layer")
    if not isinstance(embedding, nn.Embedding):
        raise _NotCoveredError("its embedding is not a plain one")
    weights = {p.dtype for p in model.parameters()}, {p.device for p in model.parameters()}
    base = {output.weight.dtype}, {output.weight.device}
    hosted = {p.dtype for n, p in model.named_parameters() if ".adapters." not in n}
    if hosted != base[0] or weights[1] != base[1]:
        raise _NotCoveredError("its weights are of several dtypes or devices")
    cos, sin = _angles(model, matched[0].module, embedding, max_tokens)
    decoder = Decoder(
        embedding=embedding,
        blocks=tuple(_block(each) for each in matched),
        final_norm=_final_norm(model, matched[-1].module, output),
        output=output,
        cos=cos,
        sin=sin,
        activation=_activation(matched),
    )
    _check_sizes(decoder)
    return decoder


def _check_settings(config: Any, max_tokens: int) -> None:
    """What a trial of a few tokens cannot show: windows, and angles that depend on the length."""
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window < max_tokens:
            raise _NotCoveredError(f"its attention has a window ({name} = {window})")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {
        each.get("rope_type") for each in rope.values() if isinstance(each, dict)
    }
    if kinds & {"dynamic", "longrope"}:
        raise _NotCoveredError("its rotary angles depend on the length of the text")


def _block(matched: Matched) -> DecoderBlock:
    before_attention, before_mlp = matched.norms.attention, matched.norms.mlp
    if not (isinstance(before_attention, RMSNorm) and isinstance(before_mlp, RMSNorm)):
        raise _NotCoveredError("its norms are not RMS norms")
    if not matched.norms.only_before:
        raise _NotCoveredError("it has norms behind its layers as well")
    projections = (
        Projection(module, number)
        for number, group in enumerate(matched.parts.linears)
        for module in group
    )
    return DecoderBlock(before_attention, before_mlp, tuple(projections))


def _activation(matched: Sequence[Matched]) -> int:
    """The activation of all blocks, by what it does."""
    like = next(matched[0].module.parameters())
    x = torch.linspace(-6, 6, 96, device=like.device, dtype=like.dtype).view(2, -1)
    wanted = torch.stack([each.parts.activation(x) for each in matched])
    made = [function(x).expand_as(wanted) for function in _ACTIVATIONS]
    # the nearest: GELU and its form with tanh are near enough to be taken for one another
    errors = [float((each - wanted).double().norm()) for each in made]
    number = errors.index(min(errors))
    if not agrees(made[number], wanted):
        raise _NotCoveredError(f"its activation is none of {', '.join(_NAMES)}")
    return number


def _final_norm(model: nn.Module, last: nn.Module, output: nn.Linear) -> RMSNorm:
    """The RMS norm between the last block and the output layer."""
    passed: dict[str, Tensor] = {}

    def leave(_module: nn.Module, _args: Any, gave: Any) -> None:
        passed["x"] = gave

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        passed["normed"] = args[0]

    handles = last.register_forward_hook(leave), output.register_forward_pre_hook(enter)
    ids = torch.arange(6, device=output.weight.device)[None]
    try:
        model(input_ids=ids % output.weight.shape[0], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    x, wanted = passed["x"].flatten(0, 1), passed["normed"].flatten(0, 1)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == x.shape[1:]:
            norm = norm_of(module, x)
            if isinstance(norm, RMSNorm) and agrees(norm.forward(x)[0], wanted):
                return norm
    raise _NotCoveredError("its output layer does not read an RMS norm of the last block")


def _angles(
    model: nn.Module, first: nn.Module, embedding: nn.Embedding, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, as the model gives them to its blocks."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        raise _ReachedError(x, kwargs["position_embeddings"])

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    found: list[tuple[Tensor, Tensor]] = []
    device = embedding.weight.device
    try:
        for start in range(0, max_tokens, _POSITIONS_AT_ONCE):
            stop_at = min(start + _POSITIONS_AT_ONCE, max_tokens)
            positions = torch.arange(start, stop_at, device=device)[None]
            ids = positions % embedding.num_embeddings
            try:
                model(input_ids=ids, position_ids=positions, use_cache=False)
            except _ReachedError as reached:
                if not agrees(embedding(ids), reached.x):
                    raise _NotCoveredError("its blocks do not start from the embedding") from None
                found.append(reached.angles)
    finally:
        handle.remove()
    cos, sin = (torch.cat([pair[k][0] for pair in found]) for k in (0, 1))
    return cos, sin


def _check_sizes(decoder: Decoder) -> None:
    sizes = {tuple(tuple(p.weight.shape) for p in block.projections) for block in decoder.blocks}
    if len(sizes) > 1:
        raise _NotCoveredError("its blocks differ in size")
    if decoder.head_size % 2:
        raise _NotCoveredError("its heads have an odd size")
