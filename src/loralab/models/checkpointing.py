"""Activation checkpointing under the name that transformers or diffusers gives it."""

from torch import nn

from loralab.errors import ModelError


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Blocks keep their input alone while training and are run again in the backward pass.

    Without re-entrant autograd, which would lose the gradient where a block's input needs none.
    Raises `ModelError` for a model that cannot.
    """
    if getattr(model, "_supports_gradient_checkpointing", False):  # a model of diffusers
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        return
    # Newer transformers renamed it, and warn on the old name.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(
            f"{type(model).__name__} cannot recompute its activations",
            "set training.activation_checkpointing to false.",
        )
    enable({"use_reentrant": False})
