"""Where a model's head, repeated blocks and embeddings are, found by structure and not by name."""

from collections.abc import Iterable, Iterator

from torch import nn

from loralab.errors import ModelError

_HEAD_NAMES = ("score", "classifier", "classification_head", "head", "fc")


def head_name(model: nn.Module) -> str:
    """The dotted name of the classification head: "score", "classifier", ...

    Raises `ModelError` where there is none, as in a causal language model.
    """
    for name in _HEAD_NAMES:
        head = model._modules.get(name)
        if head is not None and any(True for _ in head.parameters()):
            return name
    raise ModelError(
        f"{type(model).__name__} has no classification head (looked for {', '.join(_HEAD_NAMES)})",
        'load the model with task="classification", or name the modules to train whole.',
    )


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The repeated layers and their dotted name: the `ModuleList` of blocks of one class that
    carries the most parameters (of several that carry as many, the longest).

    Raises `ModelError` where there is none.
    """
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    name, found = max(
        candidates, key=lambda item: (num_parameters(item[1]), len(item[1])), default=("", None)
    )
    if found is None or not num_parameters(found):
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks",
            "choose a method that needs no layer numbers: lora, head or full.",
        )
    return name, found


def embedding_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that turn tokens into the first block's input.

    Token, position and segment embeddings with the norm that follows them, and every other name
    a tied parameter has (`lm_head.weight`).
    """
    _, layers = blocks(model)
    within_blocks = {id(parameter) for parameter in layers.parameters()}
    found = {
        id(parameter)
        for module in _embedding_modules(model)
        for parameter in module.parameters()
        if id(parameter) not in within_blocks
    }
    return _names_of(model, found)


def lower_parameters(model: nn.Module, num_layers: int, *, embedding: bool) -> set[str]:
    """Names of the parameters of the first `num_layers` blocks, and of the embedding on request.

    Raises `ModelError` where the model has fewer blocks.
    """
    name, layers = blocks(model)
    if not 0 <= num_layers <= len(layers):
        raise ModelError(
            f"cannot freeze {num_layers} layers: {name} has {len(layers)}",
            f"give a number from 0 to {len(layers)}.",
        )
    lower = {id(p) for block in list(layers)[:num_layers] for p in block.parameters()}
    return _names_of(model, lower) | (embedding_parameters(model) if embedding else set())


def num_parameters(module: nn.Module, *, without: Iterable[str] = ()) -> int:
    """How many numbers the parameters hold, tied ones once; those named in `without` left out."""
    left_out = set(without)
    named = module.named_parameters(remove_duplicate=False)
    kept = {id(p): p.numel() for name, p in named if name not in left_out}
    dropped = {
        id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in left_out
    }
    return sum(size for key, size in kept.items() if key not in dropped)


def _embedding_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules called embeddings (BERT's with its norm), else every `nn.Embedding` by itself."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "embeddings" or isinstance(module, nn.Embedding):
            yield module


def _names_of(model: nn.Module, identities: set[int]) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if id(parameter) in identities}
