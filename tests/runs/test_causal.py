"""A causal run end to end: loss on completions, log-likelihood, exact match, a continuation."""

import json
import math
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralab.config import parse_config
from loralab.errors import ConfigError, RunError
from loralab.runs.evaluate import evaluate
from loralab.runs.generate import generate
from loralab.runs.train import train

pytestmark = pytest.mark.xdist_group("causal run")  # one worker makes what its tests share

ANSWERS = {"one": "uno", "two": "due", "three": "tre", "four": "quattro"}
WORDS = ["<pad>", "<unk>", "<end>", *ANSWERS, *ANSWERS.values(), "say", "please", "now", "again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("causal")


@pytest.fixture(scope="module")
def run(folder):
    words = models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "m")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "m")
    fillers = ["say", "please", "now", "again"]
    rows = [
        {"prompt": f"{a} {b} {c} {word} ", "completion": answer}
        for a in fillers
        for b in fillers
        for c in fillers
        for word, answer in ANSWERS.items()
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = parse_config(
        {
            "model": {"name": str(folder / "m"), "task": "causal"},
            "data": {"train": str(data), "max_tokens": 16},
            "method": {"rank": 8, "alpha": 32.0},
            "training": {
                "learning_rate": 2e-2,
                "epochs": 6,
                "batch_size": 16,
                "threads": 1,
                "device": "cpu",
            },
        }
    )
    return train(settings, folder / "run")


def test_a_causal_run_learns_completions_and_says_so(run):
    document = evaluate(run)
    assert document["metrics"] == run.metrics("test")["metrics"]
    assert document["metrics"]["exact_match"]["mean"] > 0.8
    rows = run.predictions("test")
    assert all(row["target_tokens"] == 2 for row in rows)  # the answer and the end
    mean_nll = sum(row["nll"] for row in rows) / sum(row["target_tokens"] for row in rows)
    assert document["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(mean_nll))
    assert generate(run, "please say now two ", max_tokens=1)["text"].strip() == "due"


def test_an_adapter_without_its_run_answers_as_the_run_does(run, folder, tmp_path):
    prompt = "please say now two "
    wanted = generate(run, prompt, max_tokens=3)["text"]
    adapter = tmp_path / "adapter"  # whose file keeps quiet about a base in a folder
    shutil.copytree(run.folder / "adapter", adapter)
    with pytest.raises(ConfigError, match="does not name its base"):
        generate(adapter, prompt)
    assert generate(adapter, prompt, base=str(folder / "m"), max_tokens=3)["text"] == wanted
    with pytest.raises(ConfigError, match="has its base already"):
        generate(run, prompt, base=str(folder / "m"))


def test_a_folder_of_neither_is_told_what_it_lacks_and_what_to_give(tmp_path):
    with pytest.raises(RunError, match="no-such-folder is no folder"):
        generate(tmp_path / "no-such-folder", "say")
    with pytest.raises(RunError) as caught:
        generate(tmp_path, "say", base="smollm2")
    assert "no manifest.json" in caught.value.cause
    assert "no adapter_config.json" in caught.value.cause
    assert "with --base" in caught.value.next_step and "Inside" not in caught.value.next_step
    for folder, file in (("trained", "manifest.json"), ("made", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    with pytest.raises(RunError) as caught:
        generate(tmp_path, "say")
    within = f"Inside it: {tmp_path / 'made'}, {tmp_path / 'trained'}."
    assert caught.value.next_step.endswith(within)
