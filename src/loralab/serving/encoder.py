"""Classes and vectors from any transformers model: rows of many adapters in one padded batch."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from loralab.adapters import use
from loralab.errors import ModelError, RequestError
from loralab.models import last_token, mean_token
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
        self._classifies = "SequenceClassification" in type(model).__name__
        given = inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in given else {}

    def classify(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry]
    ) -> list[Float[Tensor, " classes"]]:
        """fp32 logits of each text's classes. Raises `RequestError` where there is no head."""
        if not self._classifies:
            raise RequestError(
                f"{type(self.model).__name__} has no classification head",
                "serve a run that was trained to classify.",
            )
        return list(self._forward(texts, entries)[0].logits.float())

    def embed(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry], pooling: Pooling
    ) -> Float[Tensor, "texts width"]:
        """The last hidden states in fp32: the mean over a text's tokens, or its last token's."""
        with self._hidden_states() as seen:
            _, mask = self._forward(texts, entries)
        pool = mean_token if pooling == "mean" else last_token
        return pool(seen[-1].float(), mask)

    @torch.no_grad()
    def _forward(
        self, texts: Sequence[Sequence[int]], entries: Sequence[Entry]
    ) -> tuple[Any, Int[Tensor, "texts tokens"]]:
        """The model's outputs for texts padded on the right, and the mask of real tokens."""
        longest = max(len(text) for text in texts)
        rows = [[*text, *[0] * (longest - len(text))] for text in texts]
        real = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        device = self.model.device
        mask = torch.tensor(real, device=device)
        with use(self.model, list(entries)):
            outputs = self.model(
                input_ids=torch.tensor(rows, device=device), attention_mask=mask, **self._extra
            )
        return outputs, mask

    @contextmanager
    def _hidden_states(self) -> Iterator[list[Tensor]]:
        """What the base model's forwards give inside the `with`; heads do not matter for it."""
        seen: list[Tensor] = []
        handle = self.model.base_model.register_forward_hook(
            lambda module, args, outputs: seen.append(outputs.last_hidden_state)
        )
        try:
            yield seen
        finally:
            handle.remove()


def _num_positions(model: PreTrainedModel, config: Any) -> int:
    """How long a text may be. Raises `ModelError` where the model does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise ModelError(
            f"{type(model).__name__} does not say how long its texts may be", "give `max_tokens`."
        )
    # RoBERTa counts from behind its padding id
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
