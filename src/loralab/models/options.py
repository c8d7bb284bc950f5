"""What a caller asks of a model beyond its architecture, and how that is put into it."""

from dataclasses import dataclass
from typing import Literal, cast

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from loralab.errors import ModelError
from loralab.models.classify import FACTS, Pooling, classifier_class, set_head_dropout

Task = Literal["classification", "causal"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]

_CLASSES = {
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
}
_HEAD_DROPOUTS = ("classifier_dropout", "classifier_dropout_prob", "cls_dropout")


@dataclass(frozen=True)
class Options:
    """What the caller asked of the model beyond its architecture."""

    task: Task
    num_labels: int
    head_bias: bool
    head_dropout: float
    dropout: float | None
    pooling: Pooling

    def apply(self, config: PretrainedConfig) -> type[PreTrainedModel]:
        """Writes the settings into `config`; returns the class to make the model of."""
        plain = _plain_class(config, self.task)
        if self.dropout is not None:
            _set_base_dropout(config, self.dropout)
        if self.task == "causal":
            return plain
        config.num_labels = self.num_labels
        config.problem_type = "single_label_classification"
        facts = getattr(config, FACTS, {})
        pooling = facts.get("pooling", "native") if self.pooling == "native" else self.pooling
        bias = self.head_bias or bool(facts.get("bias"))
        setattr(config, FACTS, {"pooling": pooling, "bias": bias})
        return classifier_class(plain)

    def finish(self, model: PreTrainedModel, fresh_head: str | None) -> None:
        """The settings that are no part of the configuration, and the mark of a fresh head."""
        vars(model)["_loralab_fresh_head"] = fresh_head
        _train_every_token_row(model)
        if self.dropout is not None:
            for module in model.base_model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = self.dropout
        if self.task == "classification":
            set_head_dropout(model, self.head_dropout)


def _plain_class(config: PretrainedConfig, task: Task) -> type[PreTrainedModel]:
    if type(config) not in _CLASSES[task]:
        raise ModelError(
            f"transformers has no {task} model for the type {config.model_type!r}",
            "choose another task or another model.",
        )
    found = _CLASSES[task][type(config)]
    return cast(type[PreTrainedModel], found[0] if isinstance(found, tuple) else found)


def _set_base_dropout(config: PretrainedConfig, probability: float) -> None:
    for key, value in config.to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_rate = "dropout" in key or key.endswith("pdrop")
        if is_number and is_rate and key not in _HEAD_DROPOUTS:
            setattr(config, key, probability)


def _train_every_token_row(model: PreTrainedModel) -> None:
    """Lets the gradient reach the padding token's row of the embedding.

    `nn.Embedding(padding_idx)` drops it, also where the id means something in a text (SmolLM2:
    pad = <|im_end|>). Real padding gets no gradient anyway: attention does not look at it.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None
