"""Runs trained in one pass: folders like those of runs alone, errors that name what differs."""

import json

import pytest
import torch

from loralab.adapters import read_adapter
from loralab.cli import main
from loralab.errors import ConfigError, Interrupted, PlanError
from loralab.events import Note, Phase
from loralab.planning import devices
from loralab.runs import forecast, many, telling, train as train_module
from loralab.runs.folder import open_run
from loralab.runs.grid import grid_of
from loralab.runs.many import train_many
from loralab.runs.train import resume, train

DIFFERENT = [
    {"method__rank": 2, "training__seed": 1},
    {"method__dropout": 0.1, "training__learning_rate": 3e-3},
]


@pytest.fixture
def settings(settings):
    """Few rows: a pass of a dozen steps."""
    few = {"data__train_rows": 96, "data__validation_rows": 40, "data__test_rows": 40}
    return lambda **changes: settings(**(few | changes))


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


def test_a_pass_is_planned_and_measured(settings, tmp_path) -> None:
    told: list[object] = []
    configs = [settings(training__memory_plan="stop", **changes) for changes in DIFFERENT]
    runs = train_many(configs, [tmp_path / name for name in "ab"], listen=told.append)
    for run in runs:
        memory = run.manifest["memory"]
        assert memory["runs"] == 2
        assert memory["measured_bytes"] > 0  # how near it is: tests/planning/test_plan_passes.py
        assert sum(memory["parts"].values()) == memory["predicted_bytes"]
    stated = [e.text for e in told if isinstance(e, Note) and e.topic == "memory-plan"]
    assert len(stated) == 1 and stated[0].startswith("planned peak of 2 runs in one pass: ")


def test_a_pass_that_cannot_fit_stops_with_what_would_help(settings, tmp_path, monkeypatch) -> None:
    configs = [settings(training__memory_plan="stop", training__seed=seed) for seed in range(2)]
    folders = [tmp_path / str(number) for number in range(2)]
    monkeypatch.setattr(devices, "_main_memory", lambda: 1_200_000)
    with pytest.raises(PlanError, match="a step of 2 runs needs") as caught:
        train_many(configs, folders)
    assert "at most 1 of the 2 runs in one pass" in caught.value.next_step
    assert 'training.memory_plan="warn"' in caught.value.next_step
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(forecast, "pass_levers", lambda *_: [])  # planned once above
    told: list[object] = []
    warned = [c.replace(training__memory_plan="warn", training__max_steps=2) for c in configs]
    assert all(run.finished for run in train_many(warned, folders, listen=told.append))
    assert sum(isinstance(e, Note) and e.warning and e.topic == "memory-plan" for e in told) == 1


def test_sinks_are_told_of_each_run_what_they_are_told_of_it_alone(
    settings, tmp_path, monkeypatch
) -> None:
    logs: dict[str, list[tuple[int, dict[str, float]]]] = {}

    class Sink:
        def __init__(self, folder) -> None:
            self.log_of = logs.setdefault(folder.name, [])

        def log(self, step, figures) -> None:
            self.log_of.append((step, dict(figures)))

        def close(self) -> None:
            self.log_of.append((-1, {}))

    def opened(names, folder, settings, **more):
        return [Sink(folder) for name in names if name == "tensorboard"]

    for module in (telling, many, train_module):
        monkeypatch.setattr(module, "require_sinks", lambda names: None, raising=False)
        monkeypatch.setattr(module, "open_sinks", opened, raising=False)
    configs = [settings(training__sinks=["tensorboard"], **changes) for changes in DIFFERENT]
    train_many(configs, [tmp_path / name for name in "ab"])
    train(configs[1], tmp_path / "alone")
    assert [step for step, _ in logs["b"]] == [step for step, _ in logs["alone"]]
    for (_, got), (_, wanted) in zip(logs["b"], logs["alone"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-3)
    assert logs["a"][-1] == (-1, {})


def test_losers_of_a_grid_stop_and_a_second_start_changes_nothing(settings, tmp_path) -> None:
    rates = (1e-7, 3e-3, 1e-6, 1e-5)
    configs = [
        settings(training__learning_rate=rate, training__evaluations_per_epoch=4) for rate in rates
    ]
    folders = [tmp_path / str(number) for number in range(4)]
    told: list[object] = []
    runs = train_many(configs, folders, listen=told.append, halving=True)
    assert sum(run.manifest["stopped_early"] for run in runs) == 3
    assert not runs[1].manifest["stopped_early"]
    assert sum(isinstance(e, Note) and "is in the worse half" in e.text for e in told) == 3
    titles = [e.title for e in told if isinstance(e, Phase) and e.title.startswith("training")]
    assert titles[0] == "training 4 runs in one pass"
    assert titles[-1] == "training 1 run"
    assert train_many(configs, folders, halving=True)[1].manifest == runs[1].manifest


def test_losers_need_validations(settings, tmp_path) -> None:
    configs = [settings(training__seed=s, training__epochs=1) for s in range(2)]
    configs = [c.replace(training__evaluations_per_epoch=1) for c in configs]
    with pytest.raises(ConfigError, match="at a validation only") as caught:
        train_many(configs, [tmp_path / name for name in "ab"], halving=True)
    assert "training.evaluations_per_epoch" in caught.value.next_step
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "axis", ["method.rank", "method.rank=4", "method.rank=[]", "method.scaling=[alpha/rank]"]
)
def test_an_axis_that_is_none(axis: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        grid_of("demo", (), [axis])


def test_an_axis_of_texts_and_lists() -> None:
    configs = grid_of("demo", (), ['method.targets=["all-linear", ["query", "value"], ".*key"]'])
    assert list(configs) == ["targets-all-linear", "targets-query_value", "targets-._key"]
    assert [c.method.targets for c in configs.values()] == [
        "all-linear",
        ["query", "value"],
        ".*key",
    ]


def test_what_gives_two_runs_one_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="two runs the name rank-4"):
        grid_of("demo", (), ["method.rank=[4, 8, 4]"])
    with pytest.raises(ConfigError, match=r"names method\.rank twice"):
        grid_of("demo", (), ["method.rank=[4]", "method.rank=[8]"])


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
    assert main(["train", str(recipe), "--stop-losers"]) == 2
    assert "give one" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "grid")]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"].rpartition("/")[2] for run in runs] == ["rank-2", "rank-4"]
    assert runs[0]["trainable_parameters"] < runs[1]["trainable_parameters"]


def test_the_verb_shows_the_best_first(settings, tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(settings(training__epochs=1, training__warmup=0.0).to_toml())
    grid = ["--output", str(tmp_path / "grid"), "--grid", "training.learning_rate=[1e-7,3e-3,1e30]"]
    assert main(["train", str(recipe), *grid]) == 0
    shown = capsys.readouterr()
    rows = [line for line in shown.out.splitlines() if line.startswith("learning_rate")]
    assert [row.split()[0] for row in rows] == [
        f"learning_rate-{rate}" for rate in ("3e-3", "1e-7", "1e30")
    ]
    assert rows[-1].endswith("diverged")
    assert "learning_rate-3e-3/adapter" in shown.out
    assert "learning_rate-1e30 diverged" in shown.err
    grid = ["--output", str(tmp_path / "other"), "--grid", "training.learning_rate=[1e29,1e30]"]
    assert main(["train", str(recipe), *grid]) == 1
    assert "every run of the grid diverged" in capsys.readouterr().err
