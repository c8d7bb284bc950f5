"""Keys and values of many sequences, each in a slot of its own, for transformers' own forwards."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from loralab.serving.runner import Chunk


class SlotCache(Cache):
    """A transformers cache whose rows are slots: sequences of different lengths, side by side.

    `begin` says which chunks the next forward computes; the rows of that forward are the chunks,
    padded on the right. Memory is taken for all slots when a layer first runs.
    """

    def __init__(self, num_slots: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_keys = 0

    def begin(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        """What the next forward writes, and how far back it looks."""

        def column(values: list[int]) -> Int[Tensor, " n"]:
            return torch.tensor(values, device=device)

        lengths = [len(chunk.token_ids) for chunk in chunks]
        self.slots = column([chunk.slot for chunk in chunks])
        self.starts = column([chunk.start for chunk in chunks])
        self.num_keys = max(chunk.start + len(chunk.token_ids) for chunk in chunks)
        self.written_rows = column([r for r, n in enumerate(lengths) for _ in range(n)])
        self.written_columns = column([c for n in lengths for c in range(n)])
        self.written_slots = self.slots[self.written_rows]
        self.written_places = self.starts[self.written_rows] + self.written_columns

    def visible(self, num_tokens: int, window: int | None = None) -> Bool[Tensor, "rows 1 new old"]:
        """Which keys each new token of the forward sees: those before it, at most `window`."""
        device = self.starts.device
        places = self.starts[:, None] + torch.arange(num_tokens, device=device)
        behind = places[:, :, None] - torch.arange(self.num_keys, device=device)
        seen = behind >= 0
        if window is not None:
            seen &= behind < window
        return seen[:, None]

    def update(
        self,
        key_states: Float[Tensor, "rows heads new width"],
        value_states: Float[Tensor, "rows heads new width_of_values"],
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "rows heads old width"], Float[Tensor, "rows heads old another"]]:
        """Writes the new tokens to their slots, and gives each row's keys and values from there."""
        tables = self.tables.get(layer_idx)
        if tables is None:
            tables = self._empty_like(key_states), self._empty_like(value_states)
            self.tables[layer_idx] = tables
        for table, states in zip(tables, (key_states, value_states), strict=True):
            new = states[self.written_rows, :, self.written_columns]
            table[self.written_slots, :, self.written_places] = new
        keys, values = (table[self.slots, :, : self.num_keys] for table in tables)
        return keys, values

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        for table in (table for pair in self.tables.values() for table in pair):
            table[target, :, :num_tokens] = table[source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        """Zeros, so that what is not a number stays in no slot: masking does not take it out."""
        for table in (table for pair in self.tables.values() for table in pair):
            table[slot] = 0

    def _empty_like(self, states: Tensor) -> Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(self.num_slots, heads, self.max_tokens, width)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # rows differ: positions and masks are given to the model instead

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shapes":
        """What a forward on fake tensors needs of it (`adapters.rows`): no memory is copied."""
        return _Shapes(self.num_keys)


class _Shapes(Cache):
    """Answers with keys and values of the right shape, and keeps nothing."""

    def __init__(self, num_keys: int) -> None:
        super().__init__(layers=[])
        self.num_keys = num_keys

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = (
            states[:, :, :1].expand(-1, -1, self.num_keys, -1)
            for states in (key_states, value_states)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
