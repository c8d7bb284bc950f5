"""`loralab inspect` and `explain` on real runs: an adapter, a tuned model, and the way between."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loralab.adapters import read_adapter
from loralab.cli import main
from loralab.config import RunConfig
from loralab.errors import ConfigError, RunError
from loralab.runs.inspect import inspect
from loralab.runs.lint import read_experiment
from loralab.runs.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def lora(folder: Path, settings: Callable[..., RunConfig]) -> Path:
    place = folder / "lora"
    if not place.exists():
        train(settings(data__train_rows=64), place)
    return place


@pytest.fixture
def full(folder: Path, settings: Callable[..., RunConfig]) -> Path:
    place = folder / "full"
    if not place.exists():
        train(settings(method__kind="full", data__train_rows=64), place)
    return place


def test_an_adapter_with_its_base_its_rows_and_its_page(
    lora: Path, tiny_model: Path, rows_csv: Path, tmp_path: Path
) -> None:
    page = tmp_path / "xray.html"
    found = inspect(
        lora, base=str(tiny_model), data=str(rows_csv), against=[lora / "adapter"], output=page
    )
    assert found["kind"] == "adapter" and page.is_file()
    modules = found["xray"]["modules"]
    assert len(modules) == len(read_adapter(lora / "adapter").pairs)
    assert all(module["base"]["intruders"] is not None for module in modules)
    assert [row["layer"] for row in found["dimensions"]] == [0, 1, 2]
    assert found["dimensions"][0]["before"] == found["dimensions"][0]["after"]  # the embeddings
    assert found["xray"]["overlaps"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert any("dimensions before" in line for line in found["summary"])
    assert any(other["role"] == "whole module" for other in found["xray"]["others"])
    json.dumps(found, allow_nan=False)
    # the bare folder is given the same model by what is in it
    bare = inspect(lora / "adapter", base=str(tiny_model), data=str(rows_csv))
    assert bare["dimensions"] == found["dimensions"]


def test_a_tuned_run_gives_an_adapter_that_can_be_loaded(
    full: Path, rows_csv: Path, tmp_path: Path
) -> None:
    found = inspect(full, extract=4, output=tmp_path / "extracted", data=str(rows_csv))
    assert len(found["dimensions"]) == 3
    assert found["kind"] == "checkpoint"
    extracted = found["extracted"]
    assert 0.2 < extracted["kept_share"] < 1
    assert extracted["adapter_bytes"] < extracted["checkpoint_bytes"]
    assert (tmp_path / "extracted" / "report.html").is_file()
    adapter = read_adapter(tmp_path / "extracted")
    assert adapter.config.rank == 4 and "classifier" in adapter.whole_modules
    again = inspect(tmp_path / "extracted", base=str(found["base"]))
    assert again["figures"]["changed_modules"] == len(adapter.pairs)


def test_what_is_missing_is_said_all_at_once(tiny_model: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        inspect(tiny_model, extract=4, against=[lora])
    for part in ("--base is missing", "--against compares adapters", "--extract needs --output"):
        assert part in caught.value.cause
    with pytest.raises(ConfigError, match="an adapter already"):
        inspect(lora, extract=4, output=tmp_path / "out")


def test_the_verbs(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(lora)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Rank 4") and "effective rank" in out
    page = tmp_path / "explain.html"
    assert main(["explain", str(lora), "--output", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(page)
    assert "Your adapter" in page.read_text(encoding="utf-8")


def test_no_file_but_a_page_is_replaced(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("kept")
    for verb in (["inspect", str(lora)], ["explain"]):
        assert main([*verb, "--output", str(recipe)]) == 2
        assert "recipe.toml exists already and is no page" in capsys.readouterr().err
    assert recipe.read_text() == "kept"
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_runs_are_linted_as_arms(lora: Path, full: Path) -> None:
    from loralab.evidence.linting import lint

    experiment = read_experiment([str(lora), str(full)])
    assert [arm.name for arm in experiment.arms] == ["lora rank 4", "full"]
    names = {finding.name for finding in lint(experiment)}
    assert {"one-seed", "untuned-rate"} <= names
    assert not names & {"data-order-differs", "steps-differ", "predictions-not-saved"}


def test_a_run_of_the_head_alone_has_nothing_to_look_at(
    folder: Path, settings: Callable[..., RunConfig]
) -> None:
    config = settings(method__kind="head", data__train_rows=32, training__epochs=1)
    train(config, folder / "head", splits=())
    with pytest.raises(RunError, match="trained the head alone") as caught:
        inspect(folder / "head")
    assert "lora, frozen or full" in caught.value.next_step
