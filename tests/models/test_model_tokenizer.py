"""A tokenizer that can always pad, and never grows its vocabulary."""

import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loralab.errors import ModelError
from loralab.models import load_tokenizer


def saved(folder: Path, words: list[str], **special: str) -> str:
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


@pytest.mark.parametrize(
    ("words", "special", "chosen"),
    [
        (["a", "b", "</s>"], {"eos_token": "</s>"}, "</s>"),
        (["<unk>", "a", "</s>"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        (["<unk>", "<pad>"], {"unk_token": "<unk>"}, "<pad>"),
    ],
)
def test_an_existing_token_pads_where_none_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    words: list[str],
    special: dict[str, str],
    chosen: str,
) -> None:
    with caplog.at_level(logging.WARNING, "loralab"):
        tokenizer = load_tokenizer(saved(tmp_path, words, **special))
    assert tokenizer.pad_token == chosen
    assert f"has no padding token: padding with {chosen}" in caplog.text
    assert len(tokenizer) == len(words)
    assert tokenizer.padding_side == "right"
    rows = tokenizer([words[0], f"{words[0]} {words[0]}"], padding=True)
    assert rows["attention_mask"][0] == [1, 0]


def test_its_own_padding_token_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = saved(tmp_path, ["<unk>", "x", "[P]"], pad_token="[P]", padding_side="left")
    tokenizer = load_tokenizer(name)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("[P]", "right")
    assert not caplog.text


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none that could serve as one\n.*pad_token"):
        load_tokenizer(saved(tmp_path, ["a", "b"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"has no tokenizer that transformers can read"):
        load_tokenizer(str(tmp_path / "empty"))
