"""A served classifier's head: adapters bring their own, with classes of their own number."""

from typing import Any

from torch import nn

from loralab.adapters import Adapter, Head
from loralab.models import head_name, pooling_of

HEADS = frozenset({"score", "classifier", "classification_head"})


def classification_head(model: nn.Module) -> Head | None:
    """The head of a sequence classifier; None for any other model."""
    if "SequenceClassification" not in type(model).__name__:
        return None
    config: Any = model.config
    return Head(head_name(model), config.num_labels)


def is_classifier(adapter: Adapter) -> bool:
    """Whether it was made for a sequence classifier, as far as its file tells."""
    facts = adapter.facts
    told = facts.get("task_type") == "SEQ_CLS" or "SequenceClass" in facts.get("model_class", "")
    return told or any(path.rpartition(".")[2] in HEADS for path in adapter.whole_modules)


def kind_faults(model: nn.Module, head: Head | None, adapter: Adapter) -> list[str]:
    """What an adapter's file says of its model that is not so of this one, beyond its weights."""
    if head is None:
        return (
            ["it is a classifier's, and this server writes text: serve it from a folder of its own"]
            if is_classifier(adapter)
            else []
        )
    ours, theirs = pooling_of(model), adapter.pooling
    if theirs == "native" and head.path == "score":
        theirs = "last"  # as decoders mean it
    if ours is None or theirs is None or ours == theirs:
        return []
    return [f"it was trained with pooling {theirs!r}, this server's model has pooling {ours!r}"]
