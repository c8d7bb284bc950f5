"""Which layer of a model a name in a file means."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from loralab.imaging.formats.layouts import Piece, Table, original_names

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_NAMED = 20


@dataclass(frozen=True)
class Component:
    """A part of a pipeline, and what its layers are called in files.

    kind: which part it is. path: its place in the model, empty where the model is this one part.
    dotted, underscored: name in a file -> the pieces of the part that it holds.
    ambiguous: underscored names that two layers share.
    """

    kind: str
    path: str
    modules: Mapping[str, nn.Module]
    dotted: Table
    underscored: Table
    ambiguous: frozenset[str]

    def full(self, name: str) -> str:
        """The name of a layer of this part in the whole model."""
        return f"{self.path}.{name}" if self.path else name


def components_of(model: nn.Module) -> dict[str, Component]:
    """The parts of a pipeline that the model is: one, or children called as diffusers does."""
    children = {name: child for name, child in model.named_children() if name in COMPONENTS}
    if children:
        return {name: _component(child, name, name) for name, child in children.items()}
    kind = kind_of(name for name, _ in model.named_modules())
    return {kind: _component(model, kind, "")}


def kind_of(names: Iterable[str]) -> str:
    """Which part of a pipeline has modules of these names."""
    tops = {name.split(".")[0] for name in names}
    if tops & {"transformer_blocks", "single_transformer_blocks"}:
        return "transformer"
    if tops & {"text_model", "encoder"} and not tops & {"down_blocks", "mid_block", "up_blocks"}:
        return "text_encoder"
    return "unet"


def listed(faults: Sequence[str]) -> str:
    """The faults of a file in one line: the first of them, and how many more there are."""
    more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
    return "; ".join(faults[:MAX_NAMED]) + more


def _component(part: nn.Module, kind: str, path: str) -> Component:
    modules = dict(part.named_modules())
    dotted: Table = {n: (Piece(n),) for n, m in modules.items() if isinstance(m, LAYERS)}
    for name in list(dotted):  # the level that transformers' CLIP lost in its fifth version
        inner = name.removeprefix("text_model.")
        other = inner if inner != name else f"text_model.{name}"
        dotted.setdefault(other, (Piece(name),))
    dotted |= {n: pieces for n, pieces in original_names(modules).items() if n not in dotted}
    underscored: Table = {}
    ambiguous = set()
    for name, pieces in dotted.items():
        flat = name.replace(".", "_")
        if underscored.setdefault(flat, pieces) != pieces:
            ambiguous.add(flat)
    return Component(kind, path, modules, dotted, underscored, frozenset(ambiguous))
