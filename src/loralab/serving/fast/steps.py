"""What carries a batch of tokens through the decoder: torch's operations, or the kernel."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loralab.serving.fast.batch import Batch, Group, Span
from loralab.serving.fast.coverage import Factors, Table
from loralab.serving.fast.decoder import Decoder, DecoderBlock, activate
from loralab.serving.fast.whole_numbers import Precision


@runtime_checkable
class Step(Protocol):
    """A decoder with a cache of keys and values, and the adapters it can add."""

    @property
    def precision(self) -> Precision:
        """In which the base's weights are read."""
        ...

    def run(self, batch: Batch) -> Float[Tensor, "wanted vocab"]:
        """fp32 logits after the wanted tokens; the cache holds all tokens afterwards."""
        ...

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None: ...

    def prepare(self, table: Table) -> Any:
        """What the step keeps of an adapter; from any thread."""
        ...

    def put(self, name: str, prepared: Any) -> None:
        """Serves what was prepared under that name."""
        ...

    def remove(self, name: str) -> None: ...

    def base_changed(self) -> None:
        """The base's weights are other tensors than before."""
        ...


class Cache:
    """Keys and values: (blocks, slots, kv heads, max_tokens, head_size); anything at first."""

    def __init__(self, decoder: Decoder, num_slots: int, max_tokens: int) -> None:
        shape = (
            len(decoder.blocks),
            num_slots,
            decoder.num_kv_heads,
            max_tokens,
            decoder.head_size,
        )
        self.keys = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
        self.values = torch.empty_like(self.keys)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Makes the target slot hold the first tokens of the source slot."""
        for kept in (self.keys, self.values):
            kept[:, target, :, :num_tokens] = kept[:, source, :, :num_tokens]


class TorchStep:
    """The formula in torch's operations, on any device, in any dtype.

    Layers that read the same input share one shrinking product; adapters take turns.
    """

    precision: Precision = "base"

    def __init__(self, decoder: Decoder, num_slots: int, max_tokens: int) -> None:
        self.decoder = decoder
        self.cache = Cache(decoder, num_slots, max_tokens)
        self._tables: dict[str, Table] = {}

    def prepare(self, table: Table) -> Table:
        """The factors in the base's dtype; from any thread."""

        def ready(factors: Factors | None) -> Factors | None:
            if factors is None:
                return None
            A, B = (factor.to(self.decoder.device, self.decoder.dtype) for factor in factors[:2])
            return Factors(A, B, factors.scale)

        return [[ready(each) for each in block] for block in table]

    def put(self, name: str, prepared: Table) -> None:
        """Serves what was prepared under that name."""
        self._tables[name] = prepared

    def remove(self, name: str) -> None:
        """Lets an adapter go."""
        self._tables.pop(name, None)

    def base_changed(self) -> None:
        """Nothing is kept of the base: weights are read from their modules."""

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Makes the target slot hold the first tokens of the source slot."""
        self.cache.copy_prefix(source, target, num_tokens)

    @torch.no_grad()
    def run(self, batch: Batch) -> Float[Tensor, "wanted vocab"]:
        """fp32 logits after the wanted tokens; the cache holds all tokens afterwards."""
        decoder = self.decoder
        ids, positions, slots = (
            torch.tensor(numbers, device=decoder.device)
            for numbers in (batch.ids, batch.positions, batch.slots)
        )
        angles = decoder.cos[positions][:, None], decoder.sin[positions][:, None]
        taken = [_Taken(group, decoder) for group in batch.groups]
        x = decoder.embedding(ids)
        for number, block in enumerate(decoder.blocks):
            n, _ = block.attention_norm.forward(x)
            q, k, v = self._project(n, number, block, (0, 1, 2), taken)
            q, k = (_rotate(_heads(each, decoder), *angles) for each in (q, k))
            keys, values = self.cache.keys[number], self.cache.values[number]
            keys[slots, :, positions], values[slots, :, positions] = k, _heads(v, decoder)
            attended = _attend(q, keys, values, batch.spans)
            x = x + self._project(attended, number, block, (3,), taken)[0]
            m, _ = block.mlp_norm.forward(x)
            gate, up = self._project(m, number, block, (4, 5), taken)
            gated = activate(decoder.activation, gate) * up
            x = x + self._project(gated, number, block, (6,), taken)[0]
        n, _ = decoder.final_norm.forward(x[torch.tensor(batch.wanted, device=x.device)])
        return F.linear(n, decoder.output.weight, decoder.output.bias).float()

    def _project(
        self,
        x: Float[Tensor, "tokens width"],
        number: int,
        block: DecoderBlock,
        members: Sequence[int],
        taken: Sequence["_Taken"],
    ) -> list[Tensor]:
        """The outputs of projections that read `x`, with every group's pairs on its tokens."""
        layers = [block.projections[member] for member in members]
        outputs = [F.linear(x, layer.weight, layer.bias) for layer in layers]
        for tokens in taken:
            pairs = [self._tables[tokens.adapter][number][member] for member in members]
            present = [(y, pair) for y, pair in zip(outputs, pairs, strict=True) if pair]
            if not present:
                continue
            stacked = torch.cat([pair.A for _, pair in present])
            hidden = F.linear(tokens.of(x), stacked) * tokens.weights
            parts = hidden.split([pair.A.shape[0] for _, pair in present], dim=1)
            for (y, pair), part in zip(present, parts, strict=True):
                y.index_add_(0, tokens.indices, F.linear(part * pair.scale, pair.B))
        return outputs


class _Taken:
    """A group's tokens as tensors."""

    def __init__(self, group: Group, decoder: Decoder) -> None:
        self.adapter = group.adapter
        self.indices = torch.tensor(group.tokens, device=decoder.device)
        weights = torch.tensor(group.weights, device=decoder.device, dtype=decoder.dtype)
        self.weights = weights[:, None]

    def of(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "taken width"]:
        return x[self.indices]


def _heads(rows: Float[Tensor, "tokens _"], decoder: Decoder) -> Float[Tensor, "tokens heads size"]:
    return rows.view(rows.shape[0], -1, decoder.head_size)


def _rotate(
    heads: Float[Tensor, "tokens heads size"],
    cos: Float[Tensor, "tokens 1 size"],
    sin: Float[Tensor, "tokens 1 size"],
) -> Float[Tensor, "tokens heads size"]:
    """Rotary positions (2104.09864): the two halves of a head turn against each other."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _attend(
    q: Float[Tensor, "tokens heads size"],
    keys: Float[Tensor, "slots kv_heads max_tokens size"],
    values: Float[Tensor, "slots kv_heads max_tokens size"],
    spans: Sequence[Span],
) -> Float[Tensor, "tokens width"]:
    """Each token attends to its slot up to itself. Single tokens run together."""
    output = torch.empty_like(q)
    single = [span for span in spans if span.num_tokens == 1]
    for group in [single] if single else []:
        tokens = torch.tensor([span.first for span in group], device=q.device)
        lengths = torch.tensor([span.start + 1 for span in group], device=q.device)
        slots = torch.tensor([span.slot for span in group], device=q.device)
        longest = int(lengths.max())
        seen = torch.arange(longest, device=q.device) < lengths[:, None]
        k, v = keys[slots, :, :longest], values[slots, :, :longest]
        # what lies beyond a slot's tokens may be anything, NaN too
        k, v = (each.masked_fill(~seen[:, None, :, None], 0) for each in (k, v))
        output[tokens] = _kernel(q[tokens, :, None], k, v, seen[:, None, None])[:, :, 0]
    for span in spans:
        if span.num_tokens > 1:
            tokens, end = slice(span.first, span.first + span.num_tokens), span.start
            end = span.start + span.num_tokens
            own = torch.arange(span.start, end, device=q.device)[:, None]
            seen = torch.arange(end, device=q.device) <= own
            k, v = keys[span.slot, None, :, :end], values[span.slot, None, :, :end]
            heads = _kernel(q[tokens].transpose(0, 1)[None], k, v, seen[None, None])
            output[tokens] = heads[0].transpose(0, 1)
    return output.flatten(1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
    )
