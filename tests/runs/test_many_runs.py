"""Runs trained in one pass: folders like those of runs alone, errors that name what differs."""

import json

import pytest
import torch

from loralab.adapters import read_adapter
from loralab.cli import main
from loralab.errors import ConfigError, Interrupted
from loralab.runs import many
from loralab.runs.folder import open_run
from loralab.runs.many import grid_of, train_many
from loralab.runs.train import resume, train

DIFFERENT = [
    {"method__rank": 2, "training__seed": 1},
    {"method__dropout": 0.1, "training__learning_rate": 3e-3},
]


def files_of(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_among_others_leaves_what_it_leaves_alone(settings, tmp_path) -> None:
    configs = [settings(**changes) for changes in DIFFERENT]
    folders = [tmp_path / str(number) for number in range(len(configs))]
    runs = train_many(configs, folders)
    assert all(run.finished for run in runs)
    alone = train(configs[0], tmp_path / "alone")
    assert files_of(folders[0]) == files_of(tmp_path / "alone")
    assert runs[0].config == alone.config
    assert set(runs[0].manifest) >= set(alone.manifest) - {"memory"}
    for key in ("trainable_parameters", "total_parameters", "order_hash", "steps_done"):
        assert runs[0].manifest[key] == alone.manifest[key]
    for got, wanted in zip(
        runs[0].rows_of("metrics.jsonl"), alone.rows_of("metrics.jsonl"), strict=True
    ):
        assert got.keys() == wanted.keys()
        for key in {"loss", "grad_norm", "validation_nll"} & wanted.keys():
            assert got[key] == pytest.approx(wanted[key], rel=1e-3)
    ours, theirs = (read_adapter(folder / "adapter") for folder in (folders[0], tmp_path / "alone"))
    assert set(ours.pairs) == set(theirs.pairs)
    for module, (A, B) in theirs.pairs.items():
        torch.testing.assert_close(ours.pairs[module][0], A, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.pairs[module][1], B, rtol=1e-3, atol=1e-5)
    assert train_many(configs, folders)[1].finished  # nothing is trained again


def test_an_interrupted_pass_goes_on(settings, tmp_path, monkeypatch) -> None:
    configs = [settings(training__checkpoint_steps=2, **changes) for changes in DIFFERENT]
    folders = [tmp_path / str(number) for number in range(len(configs))]
    whole = many.fit_many

    def cut(*args, **kwargs):
        for count, event in enumerate(whole(*args, **kwargs)):
            yield event
            if count == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(many, "fit_many", cut)
    with pytest.raises(Interrupted, match="every run's state is saved"):
        train_many(configs, folders)
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert not open_run(folders[0]).finished
    assert resume(folders[0]).finished  # one of them alone
    assert all(run.finished for run in train_many(configs, folders))


def test_what_must_be_alike_is_named(settings, tmp_path) -> None:
    configs = [settings(), settings(model__dtype="bfloat16", training__fuse_blocks=False)]
    configs.append(settings(method__kind="head"))
    with pytest.raises(ConfigError) as caught:
        train_many(configs, [tmp_path / name for name in "abc"])
    assert "model.dtype: 'float32' and 'bfloat16'" in caught.value.cause
    assert "training.fuse_blocks: True and False" in caught.value.cause
    assert "method.kind: head, lora; only lora leaves the base alone" in caught.value.cause
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("axis", ["method.rank", "method.rank=4", "method.rank=[]"])
def test_an_axis_that_is_none(axis: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        grid_of("demo", (), [axis])


def test_a_grid_is_every_combination() -> None:
    configs = grid_of(
        "demo", (), ["method.rank=[4, 16]", "training.learning_rate=[1e-4, 3e-4, 1e-3]"]
    )
    assert len(configs) == 6
    assert configs["rank-4-learning_rate-3e-4"].training.learning_rate == 3e-4


def test_the_verb_trains_a_grid(settings, tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(settings(training__epochs=1).to_toml())
    command = ["train", str(recipe), "--grid", "method.rank=[2,4]", "--json"]
    assert main(command) == 2
    assert "--output" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "grid")]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"].rpartition("/")[2] for run in runs] == ["rank-2", "rank-4"]
    assert runs[0]["trainable_parameters"] < runs[1]["trainable_parameters"]
