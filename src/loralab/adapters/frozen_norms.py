"""Norms that keep running statistics belong to the base, so these stay as they are.

In training mode a batch norm would update them with every batch of any adapter. So from the first
adapter to the last, the base's own norms run as in evaluation. An adapter that names one in
`whole_modules` has its own copy, whose statistics it trains and takes along.
"""

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from loralab.adapters.targets import walk


class FrozenStatistics(nn.Module):
    """The part of a norm's class that keeps it in evaluation, whatever `train` says."""

    base_class: ClassVar[type[nn.Module]]
    training: Any = property(
        lambda self: False,
        # what it goes back to when the last adapter leaves
        lambda self, mode: self.__dict__.update(training=mode),
    )

    def _get_name(self) -> str:
        return self.base_class.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.base_class,), *super().__reduce_ex__(protocol)[2:]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = frozen_class(base)
    return cls.__new__(cls)


@functools.cache
def frozen_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a frozen norm of that class; made on the fly."""
    return type(
        base.__name__, (FrozenStatistics, base), {"__module__": base.__module__, "base_class": base}
    )


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before anything of ours was put on it."""
    while "base_class" in cls.__dict__:
        cls = cls.__dict__["base_class"]
    return cls


def freeze_norms(model: nn.Module) -> None:
    """Keeps every norm with running statistics in evaluation."""
    for module in _with_statistics(model):
        if not isinstance(module, FrozenStatistics):
            # a subclass that adds methods alone; hints know no such assignment
            module.__class__ = frozen_class(type(module))  # pyright: ignore[reportAttributeAccessIssue]


def thaw_norms(model: nn.Module) -> None:
    """Makes the norms what they were; their mode is what the model was set to last."""
    for module in _with_statistics(model):
        if isinstance(module, FrozenStatistics):
            # back from that subclass
            module.__class__ = type(module).base_class  # pyright: ignore[reportAttributeAccessIssue]


def mode_of(module: nn.Module) -> bool:
    """The mode that the module was set to, also where it does not follow it."""
    return module.__dict__["training"]


def _with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    for _, module in walk(model):
        if module._buffers.get("running_mean") is not None:
            yield module
