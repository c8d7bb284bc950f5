"""Tokenizers with one token a byte, and two chat templates that say the same."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{%- else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def build_tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, so that every count in a test is a count of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(SPECIAL)
    if template:
        words = [word for word in template.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(word, vocabulary[word]) for word in words]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
