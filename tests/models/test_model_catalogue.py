"""The two models that packages carry, really loaded."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralab.catalogue import fetch
from loralab.errors import ModelError, OutputError
from loralab.models import convert, load_model, load_tokenizer, num_parameters
from loralab.models.convert import converted_folder


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return converted_folder("smollm2")


def test_minilm_puts_like_sentences_together() -> None:
    model, tokenizer = load_model("minilm", pooling="mean"), load_tokenizer("minilm")
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply."]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        pooled = []
        model.classifier.register_forward_pre_hook(lambda _, given: pooled.append(given[0]))
        assert model(**batch).logits.shape == (3, 2)
    unit = torch.nn.functional.normalize(pooled[0], dim=-1)
    near, far = unit[0] @ unit[1], unit[0] @ unit[2]
    assert near > 0.5 > 0.2 > far
    assert num_parameters(model) == 22_713_216 - 384 * 385 + 770


def test_smollm2_is_a_plain_folder_that_knows_paris(smollm2: Path) -> None:
    model, tokenizer = load_model("smollm2", task="causal"), load_tokenizer("smollm2")
    assert num_parameters(model) == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
    assert model._loralab_fresh_head is None
    assert not list(smollm2.glob("*.gguf"))


def test_smollm2_tokenizer() -> None:
    tokenizer = load_tokenizer("smollm2")
    text = "Don't pay 1234  5 €,\n\ttwice — naïve!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.eos_token_id) == (49152, "<|im_end|>", 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_a_damaged_conversion_is_made_again(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def remake(source: Path, folder: Path) -> None:
        made.append(folder)

    monkeypatch.setattr(convert, "convert", remake)
    raw = fetch("smollm2")
    monkeypatch.setattr(convert, "fetch", lambda name: raw)
    monkeypatch.setattr(convert, "cache_folder", lambda: tmp_path)
    copy = tmp_path / "converted" / smollm2.name
    copy.mkdir(parents=True)
    for file in smollm2.iterdir():
        (copy / file.name).symlink_to(file)
    assert converted_folder("smollm2") == copy
    assert not made
    (copy / "model.safetensors").unlink()
    converted_folder("smollm2")
    (copy / "model.safetensors").write_bytes(b"half")
    converted_folder("smollm2")
    (copy / "sizes.json").unlink()
    converted_folder("smollm2")
    assert made == [copy] * 3


def test_rotary_rows_come_back_in_order() -> None:
    heads, size, width = 3, 4, 2
    rows = np.arange(heads * size * width, dtype=np.float32).reshape(heads * size, width)
    # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
    permuted = rows.reshape(heads, 2, size // 2, width).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(convert._unpermuted(permuted, heads), rows)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(convert, "GGUFReader", lambda _: SimpleNamespace(fields={}))
    monkeypatch.setattr(convert, "_checked_facts", lambda *_: {})
    monkeypatch.setattr(convert, "_tensors", lambda *_: {"x": np.zeros(1000, np.float32)})
    with pytest.raises(OutputError, match="the disk is full; nothing half-written was left"):
        convert.convert(tmp_path / "some.gguf", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "falcon.gguf"
    writer = GGUFWriter(file, "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"architecture falcon .*; only llama with gpt2"):
        convert.convert(file, tmp_path / "new")


@pytest.mark.slow
def test_the_conversion_equals_transformers_own_reading(smollm2: Path) -> None:
    raw = fetch("smollm2")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = AutoModelForCausalLM.from_pretrained(raw, gguf_file=file)
    ours = load_model(str(smollm2), task="causal")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    tokenizer, reference = (
        load_tokenizer(str(smollm2)),
        AutoTokenizer.from_pretrained(raw, gguf_file=file),
    )
    text = "A film I'd not watch twice, frankly."
    assert tokenizer(text).input_ids == reference(text).input_ids
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
