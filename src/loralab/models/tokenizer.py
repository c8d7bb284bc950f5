"""`load_tokenizer`: a tokenizer that can always pad."""

import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loralab.errors import ModelError
from loralab.models.quiet import quiet
from loralab.models.resolve import model_folder

logger = logging.getLogger("loralab")

# Names that published vocabularies reserve for padding, where the settings forget to say so.
_RESERVED = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|padding|>",
)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of model `name` (as `load_model` takes it); it pads on the right.

    Where it has no padding token, one that exists is chosen and a warning says which: the
    vocabulary is never enlarged. Which one it is does not matter to the model, since padding is
    left out by the attention mask. Raises `ModelError` where there is no tokenizer.
    """
    folder = model_folder(name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        raise ModelError(
            f"{name} has no tokenizer that transformers can read: {error}",
            "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder.",
        ) from error
    if tokenizer.pad_token_id is None:
        _choose_padding(tokenizer, name)
    tokenizer.padding_side = "right"
    return tokenizer


def _choose_padding(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    vocabulary = tokenizer.get_vocab()
    special = (tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token)
    known = [token for token in (*_RESERVED, *special) if token in vocabulary]
    if not known:
        raise ModelError(
            f"the tokenizer of {name} has no padding token and none that could serve as one",
            "set pad_token in its tokenizer_config.json to a token of its vocabulary.",
        )
    tokenizer.pad_token = known[0]
    logger.warning("the tokenizer of %s has no padding token: padding with %s", name, known[0])
