"""The words of PEFT's files: names of tensors, and our own entries in their metadata."""

from collections.abc import Container
from typing import Literal

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = ".lora_"
# what follows FACTOR -> (which part, of an embedding or another layer)
PARTS: dict[str, tuple[Literal["A", "B", "magnitude"], bool]] = {
    "A.weight": ("A", False),
    "B.weight": ("B", False),
    "embedding_A": ("A", True),
    "embedding_B": ("B", True),
    "magnitude_vector": ("magnitude", False),
    "magnitude_vector.weight": ("magnitude", False),
}
TOKENS = ".token_adapter.trainable_tokens_delta"
INNER = ".base_layer."  # between a module that PEFT wrapped and what it holds
EMBEDDINGS = ("embed_tokens", "lm_head")  # saved whole where the vocabulary has grown
# PEFT 0.21 adds the delta of an attention's output projection twice: its `merge` writes the merged
# weight and then merges the inner layer once more. So B is halved and doubled on the way.
PEFT_APPLIES_OUT_PROJ = 2

# our entries in the metadata of the tensors' file
CONTENT, BASE, MODEL_CLASS = "loralab.content", "loralab.base", "loralab.model_class"
CLASSIFIER = "loralab.classifier"
CONFIG_CHECKSUM = "loralab.config_checksum"
GROUPED, APART, REPEATED = "loralab.grouped", "loralab.apart", "loralab.repeated"


def peft_name(path: str, paths: Container[str]) -> str:
    """PEFT's name of a module: an attention's output projection lies inside what it wraps."""
    if not is_inner(path, paths):
        return path
    return f"{path.removesuffix('.out_proj')}{INNER}out_proj"


def is_inner(path: str, paths: Container[str]) -> bool:
    """Whether the module is the output projection of an attention that has a pair itself."""
    return path.endswith(".out_proj") and path.removesuffix(".out_proj") in paths
