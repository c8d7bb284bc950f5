"""Encoding, with one token a byte: the tokens that count are counted letter by letter."""

import logging

import pytest
from byte_tokenizer import CHAT, MARKED_CHAT, build_tokenizer
from tokenizers import normalizers

from loralab.data import Example, encode, encoding_facts
from loralab.errors import ConfigError, DataError


def words(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def counted(tokenizer, row):
    """The tokens that count for the loss, each with what it is predicted from, as one string."""
    assert row.targets is not None and len(row.targets) == len(row.input_ids)
    assert all(
        target in (-100, token) for target, token in zip(row.targets, row.input_ids, strict=True)
    )
    return words(tokenizer, [target for target in row.targets if target != -100])


def one(tokenizer, max_tokens=64, **fields):
    (row,) = encode(
        [Example("row-1", "row-1", **fields)], tokenizer, task="causal", max_tokens=max_tokens
    )
    return row


def talk(*contents):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))


# Classification


def test_texts_get_the_tokenizers_special_tokens(bert_like):
    examples = [Example("a", "d", text="good", label=1), Example("b", "d", text="b" * 9, label=0)]
    rows = encode(examples, bert_like, task="classification", max_tokens=8)
    assert [words(bert_like, r.input_ids) for r in rows] == ["[CLS]good[SEP]", "[CLS]bbbbbb[SEP]"]
    assert [(r.id, r.group, r.label, r.targets, r.num_cut) for r in rows] == [
        ("a", "d", 1, None, 0),
        ("b", "d", 0, None, 3),
    ]
    assert encoding_facts(rows) == {
        "rows": 2,
        "tokens": 14,
        "longest_tokens": 8,
        "target_tokens": 0,
        "cut_rows": 1,
        "cut_tokens": 3,
    }


def test_no_rows_are_no_fault(bert_like, causal):
    assert encode([], bert_like, task="classification", max_tokens=8) == []
    assert encode([], causal, task="causal", max_tokens=8) == []


def test_the_models_own_limit_holds(bert_like, caplog):
    tokenizer = build_tokenizer("[CLS] $A [SEP]", model_max_length=6)
    with caplog.at_level(logging.WARNING, "loralab"):
        rows = encode(
            [Example("a", "a", text="b" * 9, label=0)],
            tokenizer,
            task="classification",
            max_tokens=99,
        )
    assert len(rows[0].input_ids) == 6
    assert "the model takes 6" in caplog.text


def test_a_text_without_tokens():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(DataError, match="rows with no tokens: a"):
        encode(
            [Example("a", "a", text="xx", label=0)],
            tokenizer,
            task="classification",
            max_tokens=9,
        )


# Texts, prompts and completions


def test_all_of_a_text_counts_and_it_ends(causal, causal_with_start):
    row = one(causal, text="abc")
    assert words(causal, row.input_ids) == counted(causal, row) == "abc<|end|>"
    row = one(causal_with_start, text="abc")
    assert words(causal_with_start, row.input_ids) == "<s>abc<|end|>"
    assert counted(causal_with_start, row) == "abc<|end|>"


def test_a_long_text_loses_its_end(causal):
    row = one(causal, text="abcdef", max_tokens=4)
    assert (words(causal, row.input_ids), row.num_cut) == ("abcd", 3)


def test_only_the_completion_counts(causal, causal_with_start):
    for tokenizer, start in ((causal, ""), (causal_with_start, "<s>")):
        row = one(tokenizer, prompt="ask:", completion="yes")
        assert words(tokenizer, row.input_ids) == f"{start}ask:yes<|end|>"
        assert counted(tokenizer, row) == "yes<|end|>"


@pytest.mark.parametrize(
    ("max_tokens", "kept"),
    [
        (9, "<s>ask:yes<|end|>"),
        (8, "<s>sk:yes<|end|>"),
        (6, "<s>:yes<|end|>"),
        (5, "<s>yes<|end|>"),
        (4, "<s>yes"),
        (2, "<s>y"),
    ],
)
def test_a_long_row_loses_its_prompt_from_the_left(causal_with_start, max_tokens, kept):
    row = one(causal_with_start, prompt="ask:", completion="yes", max_tokens=max_tokens)
    assert words(causal_with_start, row.input_ids) == kept
    assert counted(causal_with_start, row) == kept[kept.index("y") :]
    assert row.num_cut == 9 - len(row.input_ids)


def test_a_token_of_the_prompt_stays_where_nothing_else_stands_before(causal):
    row = one(causal, prompt="ask:", completion="yes", max_tokens=3)
    assert words(causal, row.input_ids) == ":ye"
    assert counted(causal, row) == "ye"


def test_an_end_is_needed(bert_like):
    with pytest.raises(DataError, match="has no end-of-text token"):
        one(bert_like, text="abc")


def test_one_token_predicts_nothing(causal):
    with pytest.raises(ConfigError, match=r"data\.max_tokens is 1"):
        one(causal, text="abc", max_tokens=1)


# Conversations


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_only_the_assistants_turns_count(causal, template):
    causal.chat_template = template
    row = one(causal, max_tokens=99, messages=talk("hi", "ho", "and", "so"))
    assert words(causal, row.input_ids) == (
        "<|user|>hi<|end|><|assistant|>ho<|end|><|user|>and<|end|><|assistant|>so<|end|>"
    )
    assert counted(causal, row) == "ho<|end|>so<|end|>"


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_a_long_conversation_keeps_its_last_answer(causal, template):
    causal.chat_template = template
    row = one(causal, max_tokens=6, messages=talk("hi", "ho", "and", "so"))
    assert words(causal, row.input_ids) == "d<|end|><|assistant|>so<|end|>"
    assert counted(causal, row) == "so<|end|>"
    row = one(causal, max_tokens=3, messages=talk("hi", "ho", "and", "so"))
    assert words(causal, row.input_ids) == "<|assistant|>so"


def test_a_template_that_rewrites_the_past_is_refused(causal):
    causal.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(DataError, match="writes turn 2 differently") as caught:
        one(causal, messages=talk("hi", "ho", "and", "so"))
    assert "{% generation %}" in caught.value.next_step


def test_a_conversation_that_starts_with_the_assistant(causal):
    causal.chat_template = CHAT
    with pytest.raises(DataError, match="starts with the assistant"):
        one(causal, messages=({"role": "assistant", "content": "ho"},))


def test_without_a_template(causal):
    with pytest.raises(DataError, match="has no chat template"):
        one(causal, messages=talk("hi", "ho"))
