"""Activation checkpointing under the name that the installed transformers gives it."""

from transformers import PreTrainedModel


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Blocks keep their input alone while training and are run again in the backward pass.

    Without re-entrant autograd, which would lose the gradient where a block's input needs none.
    """
    # Newer transformers renamed it, and warn on the old name.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
