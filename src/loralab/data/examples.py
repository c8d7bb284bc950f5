"""The values of this room: one example, one data set, one encoded row, one batch."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

IGNORED = -100
"""The target of a token that does not count."""

Message = dict[str, Any]
"""A turn of a conversation: `role`, `content`, and whatever else its template reads."""


@dataclass(frozen=True)
class Example:
    """One row as a person would read it.

    Classification has `text` and `label`; causal language modelling has `text`, or `prompt` and
    `completion`, or `messages`. `group` is the row's document, the unit that is resampled; a row
    without one is its own group.
    """

    id: str
    group: str
    text: str | None = None
    label: int | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def content(self) -> str:
        """All that a model gets to read of this row: what makes two rows duplicates."""
        if self.messages is not None:
            return "\n".join(str(turn.get("content", "")) for turn in self.messages)
        parts = (self.text, self.prompt, self.completion)
        return "\n".join(part for part in parts if part is not None)


@dataclass(frozen=True)
class Dataset:
    """Three splits of examples that share no text, and the facts a report states about them.

    `label_names[i]` is the name of label i; empty for causal language modelling.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    label_names: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Row(Protocol):
    """What a training asks of a row, whatever its model reads: text, images."""

    @property
    def id(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def label(self) -> int | None: ...

    @property
    def num_tokens(self) -> int:
        """Its length: rows of like length share a batch."""
        ...

    @property
    def num_targets(self) -> int:
        """How many terms it adds to a loss, which is a mean over terms."""
        ...

    def content(self) -> list[Any]:
        """Plain values that are equal only for equal rows."""
        ...


@dataclass(frozen=True)
class Encoded:
    """One row as a model reads it, without padding.

    `targets`, for causal language modelling, stands in line with `input_ids`: the token itself
    where it counts for the loss, -100 where not. A model shifts them by one, as those of
    transformers do. `num_cut` is how many tokens truncation took away.
    """

    id: str
    group: str
    input_ids: tuple[int, ...]
    label: int | None = None
    targets: tuple[int, ...] | None = None
    num_cut: int = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens the model reads."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """1, or its labelled tokens but for the first, which has no context."""
        if self.targets is None:
            return 1
        return sum(target != IGNORED for target in self.targets[1:])

    def content(self) -> list[Any]:
        """All that the loss depends on."""
        return [list(self.input_ids), self.label, self.targets]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them.

    `labels` holds one class a row, or one target a token (-100 where none counts).
    `row_indices` are the rows' positions in their split, where the caller gave them.
    """

    input_ids: Int64[Tensor, "rows tokens"]
    attention_mask: Int64[Tensor, "rows tokens"]
    labels: Int64[Tensor, " rows"] | Int64[Tensor, "rows tokens"]
    ids: tuple[str, ...]
    row_indices: tuple[int, ...] = ()
