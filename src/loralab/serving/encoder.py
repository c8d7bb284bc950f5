"""Classes and vectors from any transformers model: rows of many adapters in one padded batch."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralab.adapters import use, walk
from loralab.errors import ModelError, RequestError
from loralab.models import last_token, mean_token
from loralab.serving.heads import classification_head
from loralab.serving.requests import Entry
from loralab.serving.runner import Pooling


class ModelEncoder:
    """An `Encoder` on `loralab.use`: a classifier, an encoder, or a causal model's hidden states.

    model: may host adapters, whose own heads (`whole_modules`) answer for their rows.
    max_tokens: of one text; None: as many as the model counts positions.
    """

    def __init__(self, model: PreTrainedModel, *, max_tokens: int | None = None) -> None:
        config: Any = model.config.get_text_config()
        self.max_tokens = _num_positions(model, config) if max_tokens is None else max_tokens
        self.model = model.eval()
        self.vocab_size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        self._head = classification_head(model)
        self.classifies = self._head is not None
        self._head_modules = [
            (path, module)
            for path, module in walk(model)
            if self._head is not None and self._head.holds(path)
        ]
        given = inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in given else {}

    def classify(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry]
    ) -> list[Float[Tensor, " classes"]]:
        """fp32 logits of each text's own classes.

        Raises `RequestError` where there is no head, and for a mix of adapters whose heads have
        several numbers of classes.
        """
        if self._head is None:
            raise RequestError(
                f"{type(self.model).__name__} has no classification head",
                "serve a run that was trained to classify.",
            )
        counts = [self._num_classes(entry) for entry in entries]
        logits = self._forward(*self._padded(texts), entries).logits.float()
        return [row[:count] for row, count in zip(logits, counts, strict=True)]

    def embed(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry], pooling: Pooling
    ) -> Float[Tensor, "texts width"]:
        """The last hidden states in fp32: the mean over a text's tokens, or its last token's."""
        ids, mask = self._padded(texts)
        pool = mean_token if pooling == "mean" else last_token
        return pool(self._hidden_states(ids, mask, entries).float(), mask)

    def _num_classes(self, entry: Entry) -> int:
        """Of the entry's own head."""
        assert self._head is not None
        names = [entry] if isinstance(entry, str) else list(entry or ())
        if not names:
            return self._head.num_outputs
        counts = {name: self._head.num_outputs_of(self._head_modules, name) for name in names}
        if len(set(counts.values())) > 1:
            raise RequestError(
                "the adapters of this mix tell different numbers of classes apart "
                f"({', '.join(map(str, counts.values()))})",
                "mix adapters whose heads have the same classes, or ask for each of them.",
            )
        return counts[names[0]]

    def _padded(
        self, texts: Sequence[Sequence[int]]
    ) -> tuple[Int[Tensor, "texts tokens"], Int[Tensor, "texts tokens"]]:
        """Texts padded on the right, and the mask of real tokens."""
        longest = max(len(text) for text in texts)
        rows = [[*text, *[0] * (longest - len(text))] for text in texts]
        real = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(real, device=device)

    @torch.no_grad()
    def _forward(
        self,
        ids: Int[Tensor, "texts tokens"],
        mask: Int[Tensor, "texts tokens"],
        entries: Sequence[Entry],
    ) -> Any:
        """The model's outputs."""
        with use(self.model, list(entries)):
            return self.model(input_ids=ids, attention_mask=mask, **self._extra)

    def _hidden_states(
        self,
        ids: Int[Tensor, "texts tokens"],
        mask: Int[Tensor, "texts tokens"],
        entries: Sequence[Entry],
    ) -> Float[Tensor, "texts tokens width"]:
        """What the base model gives; its head, which may be none for these entries, is not run."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, outputs: Any) -> None:
            seen.append(outputs.last_hidden_state)
            if len(seen[-1]) == len(ids):  # rows are looked for in a forward of other sizes first
                raise _SeenError

        handle = self.model.base_model.register_forward_hook(keep)
        try:
            self._forward(ids, mask, entries)
        except _SeenError:
            pass
        finally:
            handle.remove()
        return seen[-1]


class _SeenError(Exception):
    """The hidden states are there: nothing more of the model needs to run."""


def _num_positions(model: PreTrainedModel, config: Any) -> int:
    """How long a text may be. Raises `ModelError` where the model does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise ModelError(
            f"{type(model).__name__} does not say how long its texts may be", "give `max_tokens`."
        )
    # RoBERTa counts from behind its padding id
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
