"""Runs any causal transformers model through its own forward, with a slot for each sequence."""

import inspect
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from loralab.adapters import Adapter, use
from loralab.errors import ModelError, RouteError
from loralab.serving.requests import Entry
from loralab.serving.runner import Chunk
from loralab.serving.slot_cache import SlotCache

ATTENTION = ("eager", "sdpa")
LAYERS = {"full_attention", "sliding_attention"}


class PlainRunner:
    """A `Runner` on `loralab.use`: every model, every kind of adapter, no code of its own.

    model: a causal model, which may host adapters; it is put in evaluation mode.
    num_slots, max_tokens: how many sequences are kept, and how long each may be. Raises
        `ModelError` where the model counts fewer positions, or where its forward cannot be told
        positions, mask and cache.
    """

    def __init__(self, model: PreTrainedModel, *, num_slots: int = 32, max_tokens: int = 2048):
        config: Any = model.config.get_text_config()
        parameters = inspect.signature(model.forward).parameters
        _check(model, config, parameters, max_tokens)
        self.model = model.eval()
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.vocab_size: int = config.vocab_size
        self._window: int | None = getattr(config, "sliding_window", None)
        self._layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        if self._window is not None and not getattr(config, "layer_types", None):
            self._layers = {"sliding_attention"}
        self._keeps_some = "logits_to_keep" in parameters
        self._cache = SlotCache(num_slots, max_tokens)
        self._mixes_rows = True

    def forward(self, chunks: Sequence[Chunk]) -> Float[Tensor, "chunks vocab"]:
        """fp32 logits after the last token of each chunk. Chunks of like length run together."""
        if not self._mixes_rows:
            return self._in_groups(chunks, mixing=False)
        try:
            return self._in_groups(chunks, mixing=True)
        except RouteError:
            answers = self._in_groups(chunks, mixing=False)
            self._mixes_rows = False  # OPT flattens its rows: one entry at a time from now on
            return answers

    def _in_groups(self, chunks: Sequence[Chunk], *, mixing: bool) -> Float[Tensor, "chunks vocab"]:
        groups: dict[Any, list[int]] = {}
        for index, chunk in enumerate(chunks):  # padding at most doubles a group's tokens
            length = (len(chunk.token_ids) - 1).bit_length()
            who = None if mixing else repr(chunk.entry)
            groups.setdefault((length, who), []).append(index)
        order = [index for indices in groups.values() for index in indices]
        answers = [self._last_logits([chunks[i] for i in indices]) for indices in groups.values()]
        return torch.cat(answers)[torch.tensor(order).argsort()]

    def all_logits(self, chunk: Chunk) -> Float[Tensor, "tokens vocab"]:
        """fp32 logits after every token of one chunk."""
        return self._logits([chunk], None)[0]

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Makes the target slot hold the first tokens of the source slot."""
        self._cache.copy_prefix(source, target, num_tokens)

    def prepare(self, name: str, adapter: Adapter) -> None:
        """Nothing: hosting is all that it takes."""

    def adapters_changed(self, only: Collection[str] | None = None) -> None:
        """Nothing: the model itself is asked at every forward."""

    def _last_logits(self, chunks: Sequence[Chunk]) -> Float[Tensor, "chunks vocab"]:
        last = [len(chunk.token_ids) - 1 for chunk in chunks]
        kept = sorted(set(last)) if self._keeps_some else None
        logits = self._logits(chunks, kept)
        places = last if kept is None else [kept.index(place) for place in last]
        answers = logits[torch.arange(len(chunks)), places]
        if not bool(torch.isfinite(answers).all()):
            for row in (~torch.isfinite(answers).all(dim=1)).nonzero().flatten().tolist():
                self._cache.clear(chunks[row].slot)
        return answers

    @torch.no_grad()
    def _logits(
        self, chunks: Sequence[Chunk], kept: list[int] | None
    ) -> Float[Tensor, "chunks tokens vocab"]:
        """Logits after the `kept` places of the padded chunks (None: all)."""
        device = self.model.device
        num_tokens = max(len(chunk.token_ids) for chunk in chunks)
        rows = [[*c.token_ids, *[0] * (num_tokens - len(c.token_ids))] for c in chunks]
        self._cache.begin(chunks, device)
        places = self._cache.starts[:, None] + torch.arange(num_tokens, device=device)
        extra = {} if kept is None else {"logits_to_keep": torch.tensor(kept, device=device)}
        with self._route([chunk.entry for chunk in chunks]):
            outputs = self.model(
                input_ids=torch.tensor(rows, device=device),
                position_ids=places.clamp(max=self.max_tokens - 1),
                attention_mask=self._masks(num_tokens),
                past_key_values=self._cache,
                use_cache=True,
                **extra,
            )
        return outputs.logits.float()

    def _route(self, entries: Sequence[Entry]) -> AbstractContextManager[None]:
        """No route where all rows use the base: its weights may have an adapter merged in."""
        if all(entry is None for entry in entries):
            return nullcontext()
        alike = all(entry == entries[0] for entry in entries)
        return use(self.model, entries[0] if alike else list(entries))

    def _masks(self, num_tokens: int) -> Any:
        """Zeros and least values, as eager and fused attention both add them; one a layer kind."""
        made = {}
        for kind in self._layers:
            window = self._window if kind == "sliding_attention" else None
            seen = self._cache.visible(num_tokens, window)
            least = torch.finfo(self.model.dtype).min
            made[kind] = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
            made[kind].masked_fill_(~seen, least)
        return made if len(made) > 1 else made.popitem()[1]


def _check(model: PreTrainedModel, config: Any, parameters: Iterable[str], max_tokens: int) -> None:
    """Raises `ModelError` that lists why this model cannot be run so."""
    name, faults = type(model).__name__, []
    missing = {"position_ids", "attention_mask", "past_key_values"} - set(parameters)
    if missing:
        faults.append(f"its forward takes no {', '.join(sorted(missing))}")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        faults.append("it is no causal language model")
    if config._attn_implementation not in ATTENTION:
        faults.append(f"its attention is {config._attn_implementation!r}, not {ATTENTION}")
    others = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if others:
        faults.append(f"it has layers of kind {', '.join(sorted(others))}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        faults.append(f"it counts {positions} positions, fewer than the {max_tokens} asked for")
    if faults:
        raise ModelError(
            f"{name} cannot be served: {'; '.join(faults)}",
            "serve a decoder with rotary or learned positions, and at most its own positions.",
        )
