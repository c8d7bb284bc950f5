"""What the engine needs of whatever runs a model: the plain runner and the fast one give it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from loralab.adapters import Adapter
from loralab.serving.requests import Entry

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Chunk:
    """Some next tokens of one sequence.

    slot: where the sequence's keys and values are kept.
    start: how many tokens the slot already holds; what it holds beyond them is overwritten.
    """

    slot: int
    token_ids: Sequence[int]
    start: int
    entry: Entry = None


@runtime_checkable
class Runner(Protocol):
    """A causal model with a cache of `num_slots` sequences of at most `max_tokens` tokens.

    All methods but `prepare` are called on the engine's thread. The chunks of a call have different
    slots, at least one token each, and may have any lengths; a chunk's answer must not depend on
    the others, nor on what its slot or another held before (not even where that was NaN).
    """

    num_slots: int
    max_tokens: int
    vocab_size: int

    def forward(self, chunks: Sequence[Chunk]) -> Float[Tensor, "chunks vocab"]:
        """fp32 logits after the last token of each chunk; the slots hold the tokens afterwards."""
        ...

    def all_logits(self, chunk: Chunk) -> Float[Tensor, "tokens vocab"]:
        """fp32 logits after every token of one chunk; the slot holds the tokens afterwards."""
        ...

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Makes the target slot hold the first tokens of the source slot."""
        ...

    def prepare(self, name: str, adapter: Adapter) -> None:
        """An adapter is about to be hosted under that name: it may be made ready meanwhile.

        From any thread. `adapters_changed`, told of that name, takes what was made for the hosted
        adapter, or drops it where none is hosted.
        """
        ...

    def adapters_changed(self, only: Collection[str] | None = None) -> None:
        """Adapters were attached, detached, merged into the weights, or the base was restored.

        only: no adapter beside these is another than before; None: any may be.
        """
        ...


@runtime_checkable
class Encoder(Protocol):
    """A model that reads whole texts at once: classes or vectors instead of tokens.

    classifies: whether it has a head that gives classes.
    """

    max_tokens: int
    vocab_size: int
    classifies: bool

    def classify(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry]
    ) -> list[Float[Tensor, " classes"]]:
        """fp32 logits of each text's classes; every entry's head may have a number of its own."""
        ...

    def embed(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry], pooling: Pooling
    ) -> Float[Tensor, "texts width"]:
        """The last hidden states in fp32, pooled; not normalised."""
        ...
