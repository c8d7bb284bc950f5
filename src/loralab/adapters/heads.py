"""Heads of another size than the model's own: each adapter's classes on one body."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loralab.adapters.doubles import plain_tensors
from loralab.adapters.hosting import hosted_items
from loralab.adapters.targets import walk


def label_names(config: Any) -> tuple[str, ...]:
    """The names that a transformers config has for a classifier's classes; empty: only numbers."""
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    return () if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


@dataclass(frozen=True)
class Head:
    """The module that makes a model's logits; num_outputs: how many the model's own makes."""

    path: str
    num_outputs: int

    def holds(self, path: str) -> bool:
        """Whether the module of that name is the head or inside it."""
        return path == self.path or path.startswith(self.path + ".")

    def shapes(
        self, module: nn.Module, given: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """(shapes that an adapter's copy of the module must have, those that it may have beside).

        Where the model's has `num_outputs` rows, the copy has as many as it has outputs; linear
        layers that make these may have a bias that the model's has, or has not.
        """
        own = plain_tensors(module)
        made = [name for name, tensor in own.items() if self._is_output(tensor)]
        counts = {given[name].shape[0] for name in made if name in given and given[name].ndim}
        count = counts.pop() if len(counts) == 1 else self.num_outputs
        must = {name: tuple(tensor.shape) for name, tensor in own.items()}
        must |= {name: (count, *must[name][1:]) for name in made}
        may = {}
        for prefix, inner in walk(module):
            if isinstance(inner, nn.Linear) and self._is_output(inner.weight):
                bias = f"{prefix}.bias" if prefix else "bias"
                must.pop(bias, None)
                may[bias] = (count,)
        return must, may

    def num_outputs_of(self, modules: Iterable[tuple[str, nn.Module]], adapter: str) -> int:
        """How many logits the adapter's own head makes, of a head whose modules are these."""
        for path, module, items in hosted_items(modules):
            if adapter not in items or not self.holds(path):
                continue
            own, copied = plain_tensors(module), plain_tensors(items[adapter])
            found = [copied[n] for n, t in own.items() if n in copied and self._is_output(t)]
            if found:
                return found[0].shape[0]
        return self.num_outputs

    def _is_output(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and tensor.shape[0] == self.num_outputs
