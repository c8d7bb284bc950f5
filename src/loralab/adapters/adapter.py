"""An adapter as a value: what was learnt, apart from any model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from loralab.adapters.probes import Probe
from loralab.adapters.settings import LoRAConfig
from loralab.lowrank import Factors

Kind = Literal["linear", "embedding", "conv1d", "conv2d", "conv3d", "attention"]


@dataclass(frozen=True)
class Layer:
    """What a pair belongs to, as far as its shapes do not tell.

    kernel: a convolution's kernel sizes; its A is (rank, in_channels / groups * positions).
    groups: of a convolution whose A sees the channels of all groups and whose B maps each group's
        share of the rank (as PEFT trains it), else 1.
    base_groups: the groups of the convolution itself.
    apart: how the layer differs from what PEFT would apply the pair with; empty where it does not.
    """

    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1
    base_groups: int = 1
    apart: str = ""

    @property
    def form(self) -> tuple[object, ...]:
        """What two pairs must agree on to have a sum (a file cannot tell attention from linear)."""
        return self.kind == "embedding", self.kernel, self.groups


_PLAIN = Layer()


@dataclass(frozen=True, eq=False)
class Adapter:
    """`pairs[module] = (A, B)` and every other tensor that differs from the base.

    extra: full name of a base parameter or buffer -> the tensor the adapter puts in its place
        (heads and other whole modules, biases).
    magnitudes: module -> DoRA's magnitude (out,).
    token_rows: embedding -> (row numbers, the rows (num_rows, dim) that replace the base's).
    layers: module -> `Layer`, for every pair.
    whole_modules: full names of the modules whose tensors are all in `extra`.
    repeated: tensors of the base that its file repeats (PEFT does with targeted embeddings, and
        with modules that it takes for whole ones); they are compared with a model's, never used.
    base: the fingerprint of the model it was trained on (`fingerprint`), where known.
    facts: what else its file said of it (task, base model's name), kept for writing.
    probes: inputs and what the adapted model said to them when it was saved.
    """

    config: LoRAConfig
    pairs: Mapping[str, tuple[Float[Tensor, "_rank _in"], Float[Tensor, "_out _rank"]]]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    token_rows: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    whole_modules: tuple[str, ...] = ()
    repeated: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, str] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()

    def scale(self, module: str) -> float:
        """The factor before `B @ A` at that module."""
        return self.config.scale_at(module, self.pairs[module][0].shape[0])

    def factors(self, module: str) -> Factors:
        """The pair at that module, for the mathematics on factor pairs."""
        A, B = self.pairs[module]
        return Factors(A=A, B=B, scale=self.scale(module))

    def layer(self, module: str) -> Layer:
        """What the pair at that module belongs to."""
        return self.layers.get(module, _PLAIN)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes that its head tells apart; empty where its file says none."""
        return tuple(json.loads(self.facts.get("classifier", "{}")).get("labels", ()))

    @property
    def pooling(self) -> str | None:
        """How the classifier that it was trained on makes one state of a text's; None: unknown."""
        return json.loads(self.facts.get("classifier", "{}")).get("pooling")

    @property
    def num_parameters(self) -> int:
        """The numbers it holds, all told."""
        tensors = [*self.extra.values(), *self.magnitudes.values()]
        tensors += [tensor for pair in self.pairs.values() for tensor in pair]
        tensors += [values for _, values in self.token_rows.values()]
        return sum(tensor.numel() for tensor in tensors)
