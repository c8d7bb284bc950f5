"""Base models, their tokenizers and task heads; where their parts are; facts about sizes."""

from loralab.models.checkpointing import enable_activation_checkpointing
from loralab.models.classify import (
    Pooling,
    last_token,
    mean_token,
    name_labels,
    pooling_of,
    reads_last_token,
)
from loralab.models.hub import HUB_ID, PICKLES, hub_folder, pickle_error
from loralab.models.load import build_model, load_model, redraw_head
from loralab.models.options import Dtype, Task
from loralab.models.precision import choose_dtype
from loralab.models.prefix import evaluating, replaced_prefix, run_prefix
from loralab.models.presets import PRESETS
from loralab.models.quiet import quiet
from loralab.models.resolve import model_folder
from loralab.models.structure import (
    blocks,
    embedding_parameters,
    head_name,
    lower_parameters,
    num_parameters,
)
from loralab.models.tokenizer import load_tokenizer
from loralab.models.weights import StoredWeights

__all__ = [
    "HUB_ID",
    "PICKLES",
    "PRESETS",
    "Dtype",
    "Pooling",
    "StoredWeights",
    "Task",
    "blocks",
    "build_model",
    "choose_dtype",
    "embedding_parameters",
    "enable_activation_checkpointing",
    "evaluating",
    "head_name",
    "hub_folder",
    "last_token",
    "load_model",
    "load_tokenizer",
    "lower_parameters",
    "mean_token",
    "model_folder",
    "name_labels",
    "num_parameters",
    "pickle_error",
    "pooling_of",
    "quiet",
    "reads_last_token",
    "redraw_head",
    "replaced_prefix",
    "run_prefix",
]
