"""`loralab rank`: candidates, the choice and its confirmation, on runs of a tiny model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from loralab.adapters import Decomposed, install, read_adapter, use, write_adapter
from loralab.cli import main
from loralab.config import RunConfig
from loralab.errors import LoralabError
from loralab.events import ignore
from loralab.runs.folder import Run
from loralab.runs.rank import rank
from loralab.runs.rank_trainings import refine
from loralab.runs.subject import held_out, open_subject
from loralab.runs.train import train
from loralab.runs.workbench import base_model

# PEFT's call
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(folder: Path, settings: Callable[..., RunConfig]) -> Path:
    place = folder / "lora"
    if not place.exists():
        train(settings(method__rank=8, method__alpha=16.0, data__train_rows=160), place)
    return place


def test_a_run_truncated_chosen_confirmed_and_saved(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    found = rank(run, tolerance=0.05, output=output, refine_steps=3)
    assert json.loads((output / "rank.json").read_text()) == found
    for rule in ("uniform", "global"):
        curve = [row for row in found["curve"] if row["rule"] == rule]
        assert [row["rank"] for row in curve] == [6, 4, 3, 2, 1]
        sizes = [row["bytes"] for row in curve]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] < found["full"]["bytes"]
        passes = [row["holds"] for row in curve]
        before = passes.index(False) if False in passes else len(passes)
        assert [row["chosen"] for row in curve] == [i == before - 1 for i in range(len(curve))]
    chosen = found["chosen"]
    assert chosen is not None and chosen["confirm"]["rows"] == found["rows"]["confirm"]
    saved = read_adapter(output / "adapter")
    assert {A.shape[0] for A, _ in saved.pairs.values()} == {chosen["rank"]}
    assert saved.probes
    page = (output / "report.html").read_text()
    assert "Every candidate" in page and "Refined for 3 steps" in page
    assert found["verdict"].startswith(f"Rank {chosen['rank']} is enough")


def test_peft_reads_the_truncated_adapter(
    run: Path, tmp_path: Path, settings: Callable[..., RunConfig]
) -> None:
    found = rank(run, tolerance=10.0, rule="global", ranks=(3,), output=tmp_path / "smaller")
    folder, config = tmp_path / "smaller" / "adapter", settings()
    base, ours = base_model(config).eval(), base_model(config).eval()
    theirs = PeftModel.from_pretrained(base, folder).eval()
    install(ours, read_adapter(folder), "small")
    ids = torch.arange(4, 16).reshape(2, 6)
    with torch.no_grad(), use(ours, "small"):
        torch.testing.assert_close(
            theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
    assert found["chosen"]["rule"] == "global" and len(set(found["chosen"]["ranks"].values())) > 1


def test_an_adapter_that_is_no_run_gives_the_same_curve(
    run: Path, rows_csv: Path, tiny_model: Path, folder: Path
) -> None:
    asked = {"data": str(rows_csv), "ranks": (2,), "rules": ("uniform",)}
    of_run = rank(run, **asked)
    other = ["data.max_tokens=32", 'training.device="cpu"', "training.threads=1"]
    alone = rank(run / "adapter", base=str(tiny_model), overrides=other, **asked)
    assert alone["curve"] == of_run["curve"] and alone["rows"] == of_run["rows"]
    assert of_run["rows"]["choose"] + of_run["rows"]["confirm"] == 600


@pytest.fixture(scope="module")
def made_by_peft(folder: Path, tiny_model: Path) -> dict[str, Path]:
    """Adapters that PEFT wrote of a classifier with its own pooling: untrained, random."""
    places = {"untrained": folder / "peft-untrained", "random": folder / "peft-random"}
    for place, untrained in zip(places.values(), (True, False), strict=True):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
        settings = LoraConfig(
            task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=untrained
        )
        get_peft_model(base, settings).save_pretrained(str(place))
    return places


def test_an_adapter_that_peft_made_is_scored_as_peft_scores_it(
    made_by_peft: dict[str, Path], tiny_model: Path, rows_csv: Path
) -> None:
    folder = made_by_peft["random"]
    subject = open_subject(folder, base=str(tiny_model), data=str(rows_csv))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    rows = held_out(subject, None, ignore).choose[:5]
    with torch.no_grad():
        logits = [theirs(input_ids=torch.tensor([row.input_ids])).logits[0] for row in rows]
    labels = torch.tensor([row.label for row in rows])
    nll = cross_entropy(torch.stack(logits), labels, reduction="none")
    assert subject.scores(subject.adapter, rows).nll == pytest.approx(nll.numpy(), abs=1e-5)


def test_an_adapter_that_changes_nothing_is_named(
    made_by_peft: dict[str, Path], tiny_model: Path, rows_csv: Path
) -> None:
    with pytest.raises(LoralabError, match="B is zero in all 2 modules"):
        rank(made_by_peft["untrained"], base=str(tiny_model), data=str(rows_csv))


def test_a_recipe_is_trained_once_high_and_at_other_ranks(
    settings: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, output = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(settings(data__train_rows=64, training__epochs=1).to_toml())
    command = ["rank", str(recipe), "--high", "8", "--ranks", "2", "--trained", "2,8"]
    command += ["--rates", "3e-3,1e-2", "compare.max_extensions=0", "--tolerance", "5", "--json"]
    assert main([*command, "--output", str(output)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["full"]["rank"] == 8
    assert sorted(child.name for child in output.iterdir() if child.is_dir()) == [
        "adapter",
        "trained-rank-2",
        "trained-rate-1.0e-02",
        "trained-rate-3.0e-03",
    ]
    low, high = found["trained"]
    assert (low["rank"], high["rank"]) == (2, 8)
    assert low["bytes"] == found["curve"][0]["bytes"] and high["truncated"] is None
    gap = low["trained"]["nll"]["mean"] - low["truncated"]["nll"]["mean"]
    assert low["difference"]["mean"] == pytest.approx(gap)
    assert "Trained at each rank instead" in (output / "report.html").read_text()
    assert main([*command, "--output", str(output)]) == 2  # it is finished
    assert "exists already" in capsys.readouterr().err


def test_refining_starts_from_the_truncated_adapter(
    run: Path, settings: Callable[..., RunConfig]
) -> None:
    subject = open_subject(run)
    small = Decomposed(subject.adapter).truncated(dict.fromkeys(subject.adapter.pairs, 2))
    barely = replace(subject, run=replace_rate(subject.run, 1e-12))
    refined = refine(barely, small, 1, ignore)
    for module, (A, B) in small.pairs.items():
        torch.testing.assert_close(refined.pairs[module], (A, B), atol=1e-6, rtol=1e-4)
    for name, tensor in small.extra.items():
        torch.testing.assert_close(refined.extra[name], tensor, atol=1e-6, rtol=1e-4)


def replace_rate(run: Run | None, rate: float) -> Run:
    assert run is not None
    return Run(run.folder, run.config.replace(training__learning_rate=rate), run.manifest)


def bad_inputs(run: Path, folder: Path, rows_csv: Path) -> dict[str, tuple[dict[str, Any], str]]:
    labelled = folder / "labels.csv"
    labelled.write_text("text,label\n" + "".join(f"a film {i},{i % 3}\n" for i in range(60)))
    empty = folder / "empty.csv"
    empty.write_text("text,label\n")
    few = folder / "few.csv"
    few.write_text("text,label\na fine film,1\na dull film,0\n")
    bare = folder / "bare"
    if not bare.exists():
        adapter = read_adapter(run / "adapter")
        write_adapter(replace(adapter, pairs={}, layers={}, base=None, probes=()), bare)
    return {
        "tolerance": ({"tolerance": 0.0}, "no truncation loses that little"),
        "not a number": ({"tolerance": float("nan")}, "no truncation loses that little"),
        "ranks": ({"ranks": (4, 0)}, "ranks to try: 0"),
        "no smaller": ({"ranks": (8, 16)}, "no smaller rank is to be tried"),
        "labels": ({"data": str(labelled)}, "labels"),
        "empty": ({"data": str(empty)}, "empty.csv"),
        "few": ({"data": str(few)}, "too few held-out rows"),
        "folder": ({"output": folder}, "exists already"),
        "no adapter": ({"source": folder, "base": "minilm", "data": "tweets"}, str(folder)),
        "no recipe": ({"source": "nothing"}, "no recipe 'nothing'"),
        "trained without output": ({"trained": (2,)}, "--output is missing"),
        "base of a run": ({"base": "minilm"}, "has its base and settings already"),
        "no data": ({"source": run / "adapter"}, "--data is missing"),
        "no factors": (
            {"source": bare, "base": str(run), "data": str(rows_csv)},
            "holds no factor pairs",
        ),
        "refined adapter": (
            {"source": run / "adapter", "data": str(rows_csv), "refine_steps": 2},
            "is no run",
        ),
    }


def test_bad_inputs_name_the_fault_and_the_next_step(
    run: Path, folder: Path, rows_csv: Path, tiny_model: Path
) -> None:
    for name, (changes, words) in bad_inputs(run, folder, rows_csv).items():
        asked: dict[str, Any] = {"source": run, "ranks": (1,), "rules": ("uniform",)} | changes
        if name in ("no factors", "refined adapter"):
            asked |= {"base": str(tiny_model), "tolerance": 10.0}
        with pytest.raises(LoralabError) as caught:
            rank(**asked)
        assert words in caught.value.cause, name
        assert caught.value.next_step


def test_a_full_run_has_no_rank(folder: Path, settings: Callable[..., RunConfig]) -> None:
    place = folder / "head"
    train(settings(method__kind="head", data__train_rows=32, training__epochs=1), place, splits=())
    with pytest.raises(LoralabError, match="has no adapter"):
        rank(place)


def test_options_that_go_together_and_lists_that_are_none(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", str(run), "--ranks", "8,x"]) == 2
    assert "--ranks '8,x' is no list of numbers" in capsys.readouterr().err
    for option in (["--base", "minilm"], ["--budget", "0.1"]):
        assert main(["evaluate", str(run), *option]) == 2
        assert "--base, --budget and --output go with --forgetting" in capsys.readouterr().err
    for option in (["--high", "8"], ["--rates", "1e-3"]):
        assert main(["rank", str(run), *option]) == 2
        assert "--high and --rates train a recipe" in capsys.readouterr().err
