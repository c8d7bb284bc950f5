"""`loralab evaluate --forgetting`: gain, forgetting, and the dial, on a tiny language model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralab.adapters import read_adapter, targets
from loralab.cli import main
from loralab.config import RunConfig, parse_config
from loralab.errors import LoralabError
from loralab.models import load_model
from loralab.runs.advice import advice
from loralab.runs.forgetting import forgetting
from loralab.runs.train import train

pytestmark = pytest.mark.xdist_group("forgetting")  # one worker makes what its tests share

WORDS = [f"w{i}" for i in range(24)]
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, rows of a task, and a text to keep."""
    place = tmp_path_factory.mktemp("forgetting")
    vocabulary = [*SPECIAL.values(), *WORDS]
    words = models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(place / "m")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    learn_to_count(model, first=len(SPECIAL))
    model.save_pretrained(place / "m")
    chance = torch.Generator().manual_seed(0)

    def some(count: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(24, (count,), generator=chance).tolist())

    rows = [{"prompt": f"{some(5)} ", "completion": "w0 w1"} for _ in range(200)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [f'"{some(5)} w{i % 2}",{i % 2}' for i in range(200)]
    (place / "labelled.csv").write_text("\n".join(["text,label", *labelled]))
    counted = [" ".join(WORDS[(i + j) % 24] for j in range(4 + i // 24)) for i in range(120)]
    (place / "general.txt").write_text("\n\n".join(counted))
    return place


def learn_to_count(model: LlamaForCausalLM, *, first: int) -> None:
    """What the base knows, and so can forget: each word is followed by the next."""
    ids = first + (torch.arange(24)[:, None] + torch.arange(10)) % 24
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()


def settings(folder: Path, task: str) -> RunConfig:
    rows = "rows.jsonl" if task == "causal" else "labelled.csv"
    return parse_config(
        {
            "model": {"name": str(folder / "m"), "task": task},
            "data": {"train": str(folder / rows), "max_tokens": 32},
            "method": {"rank": 4, "alpha": 16.0},
            "training": {
                "learning_rate": 2e-2,
                "epochs": 2,
                "batch_size": 16,
                "threads": 1,
                "device": "cpu",
                "memory_plan": "off",
            },
        }
    )


@pytest.fixture
def run(folder: Path) -> Path:
    place = folder / "causal"
    if not place.exists():
        train(settings(folder, "causal"), place, splits=())
    return place


def test_the_dial_gains_forgets_chooses_and_saves(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "milder"
    command = ["evaluate", str(run), "--forgetting", str(folder / "general.txt")]
    command += ["--budget", "0.1", "--output", str(output), "--json"]
    assert main(command) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    scales = {p["value"]: p for p in found["points"] if p["dial"] == "scale"}
    assert list(scales) == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert scales[1.0]["gain"]["mean"] > 0.5  # it learnt its task
    forgotten = [point["forgotten"]["mean"] for point in scales.values()]
    assert forgotten == sorted(forgotten)
    chosen = found["chosen"]
    assert chosen["forgotten"]["upper"] < 0.1 < scales[1.25]["forgotten"]["upper"]
    allowed = [p["gain"]["mean"] for p in found["points"] if p["holds"]]
    assert chosen["gain"]["mean"] == max(allowed)
    whole, saved = read_adapter(run / "adapter"), read_adapter(output / "adapter")
    for module in whole.pairs:
        own, weaker = whole.factors(module), saved.factors(module)
        before = torch.linalg.svdvals(own.scale * own.B @ own.A)
        after = torch.linalg.svdvals(weaker.scale * weaker.B @ weaker.A)
        if chosen["dial"] == "scale":
            torch.testing.assert_close(after, chosen["value"] * before, atol=1e-5, rtol=1e-4)
        else:
            assert bool((after <= before + 1e-5).all())
    page = (output / "report.html").read_text()
    assert "What a weaker adapter gains and forgets" in page
    assert json.loads((output / "forgetting.json").read_text()) == found


def test_a_classifiers_base_is_read_as_the_language_model_it_is(folder: Path) -> None:
    place = folder / "classifier"
    train(settings(folder, "classification"), place, splits=())
    found = forgetting(place, str(folder / "general.txt"), budget=5.0)
    assert found["unit"] == "nats a row" and found["before"]["keep_nll"] < 2.5
    assert found["chosen"]["confirm"]["keep_rows"] == found["rows"]["keep"]["confirm"]


def test_bad_inputs(run: Path, folder: Path, tiny_model: Path, rows_csv: Path) -> None:
    (folder / "short.txt").write_text("one paragraph of text\n\nand one more")
    general = str(folder / "general.txt")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"budget": 0.0}, "--budget 0 nats"),
        ({"keep": str(folder / "short.txt")}, "too few rows"),
        ({"output": folder}, "exists already"),
        ({"keep": "no-such-data"}, "no-such-data"),
    ]
    for changes, words in cases:
        asked: dict[str, Any] = {"keep": general} | changes
        with pytest.raises(LoralabError) as caught:
            forgetting(run, **asked)
        assert words in caught.value.cause


def test_an_encoder_has_no_text_to_forget(
    folder: Path, tiny_model: Path, rows_csv: Path, tmp_path: Path
) -> None:
    config = settings(folder, "classification")
    encoder = config.replace(
        model__name=str(tiny_model), data__train=str(rows_csv), data__train_rows=32
    )
    run = train(encoder, tmp_path / "encoder", splits=())
    with pytest.raises(LoralabError, match="no language model"):
        forgetting(run.folder, str(folder / "general.txt"))


def test_advice_counts_the_bits_of_completions_by_the_bases_own_loss(folder: Path) -> None:
    found = advice(settings(folder, "causal").replace(data__train_rows=40))
    assert found["rows"] == 40 and found["bits"]["low"] == found["bits"]["high"]  # all were read
    tokens = 3 * 40  # w0 w1 <end>
    assert 0.5 * tokens < found["bits"]["mean"] < 15 * tokens
    model = load_model(str(folder / "m"), task="causal")
    tree = targets(model, rank=8)
    row = next(row for row in found["ranks"] if row["rank"] == 8)
    assert row["all-linear"]["parameters"] == tree.all_linear_parameters
    attention = sum(c.cost for c in tree if c.name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert row["attention"]["parameters"] == 8 * attention


def test_advice_of_a_classifier_counts_its_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(settings(folder, "classification").to_toml())
    assert main(["rank", str(recipe), "method.targets=['q_proj']", "--advice", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.9 * found["rows"] < found["bits"]["mean"] <= found["rows"]
    assert found["smallest"]["the recipe's targets"]["rank"] >= 1
    assert main(["rank", str(recipe), "--advice"]) == 0
    assert "rule of thumb" in capsys.readouterr().out
