"""Sequence classifiers that pool by the attention mask, on top of the plain transformers classes.

transformers finds a row's last token by comparing with `config.pad_token_id`. Where padding
shares its id with a real token (SmolLM2: pad = eos = <|im_end|>) that finds the wrong one, and
with input embeddings it finds none. Here only the attention mask says what is padding.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from loralab.errors import ModelError
from loralab.models.structure import head_name

Pooling = Literal["native", "mean", "last"]

FACTS = "loralab_head"
"""The field of a model's config that holds `{"pooling", "bias"}`, so that a saved model is
loaded again as it was trained."""


def last_token(
    hidden: Float[Tensor, "rows tokens width"], mask: Shaped[Tensor, "rows tokens"]
) -> Float[Tensor, "rows width"]:
    """Each row's hidden state at its last real token, whichever side the padding is on."""
    place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask.bool() * place).argmax(dim=-1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def mean_token(
    hidden: Float[Tensor, "rows tokens width"], mask: Shaped[Tensor, "rows tokens"]
) -> Float[Tensor, "rows width"]:
    """The mean of each row's hidden states over its real tokens, summed in float32."""
    real = mask.bool().unsqueeze(-1)
    total = hidden.float().masked_fill(~real, 0.0).sum(dim=1)
    return (total / real.sum(dim=1).clamp(min=1)).to(hidden.dtype)


def positions(mask: Shaped[Tensor, "rows tokens"]) -> Shaped[Tensor, "rows tokens"]:
    """Position of each real token in its row, counted from 0 after any padding on the left."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


# At run time no subclass of PreTrainedModel: its own class attributes would hide the plain class's.
_Base = PreTrainedModel if TYPE_CHECKING else object


class MaskPooled(_Base):
    """What `classifier_class` puts in front of a plain class; not used by itself."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        facts: dict[str, Any] = getattr(config, FACTS)
        self._head = head_name(self)
        self._pooling: Pooling = facts["pooling"]
        if self._pooling == "native" and self._head == "score":
            self._pooling = "last"  # what the plain class means to do
        if self._pooling != "native":
            _drop_poolers(self, self._head)
        arguments = inspect.signature(self.base_model.forward).parameters
        # Only decoders: RoBERTa's positions, for one, start behind its padding id.
        self._gives_positions = self._head == "score" and "position_ids" in arguments
        self._takes_cache = "use_cache" in arguments
        head = self.get_submodule(self._head)
        # Noted now, since adapters may wrap the head in a module of another class.
        self._head_is_linear = isinstance(head, nn.Linear)
        if isinstance(head, nn.Linear):
            if facts["bias"] and head.bias is None:
                head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
            if self._pooling != "native" and not hasattr(self, "dropout"):
                self.dropout = nn.Dropout(0.0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Class logits of each row, and the mean cross-entropy where `labels` are given.

        `input_ids` or `inputs_embeds` (rows, tokens[, width]); `attention_mask` (rows, tokens),
        1 at real tokens, all real where it is None; `labels` (rows,). Other arguments go to the
        base model. Logits are (rows, classes) in the model's dtype, the loss is float32.
        """
        as_tuple = kwargs.pop("return_dict", None) is False
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise ValueError("give input_ids or inputs_embeds")
        if self._pooling == "native":
            outputs = super().forward(
                **given, attention_mask=attention_mask, return_dict=True, **kwargs
            )
            logits = outputs.logits
        else:
            outputs, logits = self._pool(given, attention_mask, kwargs)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        result = SequenceClassifierOutput(
            loss=cast(Any, loss),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if as_tuple else result

    def _pool(
        self, given: dict[str, Tensor], attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Any, Float[Tensor, "rows classes"]]:
        """The base model's output, and the head's on what is pooled from it."""
        if self._gives_positions and attention_mask is not None:
            kwargs.setdefault("position_ids", positions(attention_mask))
        if self._takes_cache:
            kwargs.setdefault("use_cache", False)
        outputs = self.base_model(
            **given, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        hidden = outputs.last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        pool = mean_token if self._pooling == "mean" else last_token
        return outputs, self._classify(pool(hidden, attention_mask))

    def _classify(self, pooled: Float[Tensor, "rows width"]) -> Float[Tensor, "rows classes"]:
        head = self.get_submodule(self._head)
        if self._head_is_linear:
            return head(self.dropout(pooled))
        return head(pooled.unsqueeze(1))  # RoBERTa's kind of head takes the first of the tokens


def name_labels(model: nn.Module, names: Sequence[str]) -> None:
    """Writes the names of a classifier's classes into its config, which is saved with it."""
    config = cast(PretrainedConfig, model.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def pooling_of(model: nn.Module) -> Pooling | None:
    """How a classifier of `load_model` makes one state of a text's; None for any other model."""
    return model._pooling if isinstance(model, MaskPooled) else None


def reads_last_token(model: nn.Module) -> bool:
    """Whether of the last block's output nothing is read but each row's last real token."""
    return isinstance(model, MaskPooled) and model._pooling == "last"


@cache
def classifier_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the transformers class `plain` that pools by the attention mask.

    Its config must hold `FACTS`. Names of parameters are those of `plain`. It keeps the plain
    class's name and module, because transformers writes the one into saved configs and looks up
    the source of the other.
    """
    members = {"__module__": plain.__module__, "__doc__": plain.__doc__}
    return cast(type[PreTrainedModel], type(plain.__name__, (MaskPooled, plain), members))


def set_head_dropout(model: PreTrainedModel, probability: float) -> None:
    """Sets the dropouts outside the base; `ModelError` where one is wanted and there is none."""
    outside = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and not _within_base(model, name)
    ]
    if probability and not outside:
        raise ModelError(
            f"{type(model).__name__} has no dropout in front of its head",
            'set model.head_dropout = 0, or model.pooling = "mean" or "last".',
        )
    for module in outside:
        module.p = probability


def _drop_poolers(model: PreTrainedModel, head: str) -> None:
    """Removes the modules that would have pooled, so that no parameter is left unused."""
    if "pooler" in model.base_model._modules:
        model.base_model.pooler = cast(Any, None)
    kept = {model.base_model_prefix, head}
    unused = [
        name
        for name, child in model.named_children()
        if name not in kept and any(True for _ in child.parameters())
    ]
    if unused:
        raise ModelError(
            f"{type(model).__name__} pools in a way of its own, with {', '.join(unused)}",
            'set model.pooling = "native".',
        )


def _within_base(model: PreTrainedModel, name: str) -> bool:
    return name.split(".", 1)[0] == model.base_model_prefix
