"""Settings converted to another rank, scaling, initialisation or alpha start the same training."""

import json
import shlex

import pytest

from loralab.cli import main
from loralab.config import load_config
from loralab.errors import AdapterError, ConfigError
from loralab.runs.convert import convert, parse_changes
from loralab.runs.train import train

EXACT = {
    "training__weight_decay": 0.0,
    "training__max_grad_norm": 0.0,
    "training__epsilon": 1e-30,
    "data__train_rows": 96,
    "data__validation_rows": 16,
    "training__epochs": 1,
}


@pytest.mark.parametrize(
    "change",
    [{"alpha": 32.0}, {"scaling": "alpha/sqrt(rank)"}, {"alpha": 2, "scaling": "alpha/sqrt(rank)"}],
)
def test_a_converted_recipe_trains_the_same_to_the_bit(change, settings, tmp_path):
    config = settings(**EXACT, method__rank_pattern={"query": 16})
    conversion = convert(config, change)
    assert conversion.notes == ("the two trainings are the same, step by step",)
    assert conversion.first_update_ratio == pytest.approx((1.0, 1.0))
    curves = []
    for name, recipe in (("before", config), ("after", conversion.config)):
        run = train(recipe, tmp_path / name, splits=())
        curves.append([row["loss"] for row in run.rows_of("metrics.jsonl") if "loss" in row])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        ({"rank": 16}, {"method.rank": 16}),
        (
            {"rank": 16, "scaling": "alpha/sqrt(rank)"},
            {"method.rank": 16, "method.scaling": "alpha/sqrt(rank)", "method.alpha": 2.0},
        ),
        ({"alpha": 4.0}, {"method.alpha": 4.0, "method.loraplus_lr_ratio": 2.0}),
        (
            {"init": "eva"},  # std(A) grows by sqrt(3), and so does the time before A moves
            {
                "method.init": "eva",
                "method.alpha": 8 / 3**0.5,
                "training.learning_rate": 1e-2 * 3**0.5,
                "training.head_learning_rate": 1e-2,
                "method.loraplus_lr_ratio": 3**-0.5,
            },
        ),
    ],
)
def test_the_overrides_keep_both_knobs(change, overrides, settings):
    conversion = convert(settings(), change)
    assert conversion.overrides.keys() == overrides.keys()
    for key, value in overrides.items():
        found = conversion.overrides[key]
        assert found == (value if isinstance(value, str) else pytest.approx(value))
    for knob in ("first_update", "steps_before_A_moves"):
        assert conversion.after[knob] == pytest.approx(conversion.before[knob])


def test_what_one_alpha_cannot_keep_is_said(settings):
    conversion = convert(settings(), {"init": "gaussian"})
    low, high = conversion.first_update_ratio
    assert high / low == pytest.approx(2**0.5)  # 32 and 64 inputs
    assert any("one alpha serves all" in note for note in conversion.notes)
    assert any("draws other numbers" in note for note in conversion.notes)


def test_conditions_are_named(settings):
    (note,) = convert(settings(), {"alpha": 4.0}).notes
    for key in ("weight_decay = 0", "max_grad_norm = 0", "epsilon = 1e-30"):
        assert f"training.{key}" in note


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rnk": 4}, ConfigError, "'rnk' \\(did you mean 'rank'"),
        ({}, ConfigError, "no conversion is known for nothing"),
        ({"rank": 0}, ConfigError, "method.rank: input should be greater than 0"),
        ({"init": "pissa"}, AdapterError, "B does not start at zero"),
    ],
)
def test_what_cannot_be_converted_is_refused(changes, error, words, settings):
    with pytest.raises(error, match=words):
        convert(settings(), changes)
    with pytest.raises(ConfigError, match="neither rank nor alpha"):
        convert(settings(method__kind="full"), {"rank": 4})


def test_the_command_line_prints_overrides_that_can_be_used(settings, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(settings(method__rank_pattern={r"layer\.0\..*": 2}).to_toml())
    changes = ["--convert", "rank=16", "--convert", "scaling=alpha/sqrt(rank)"]
    assert main(["doctor", str(recipe), *changes, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    converted = load_config(recipe, told["arguments"])
    assert (converted.method.rank, converted.method.alpha) == (16, 2.0)
    assert converted.method.alpha_pattern == {r"layer\.0\..*": pytest.approx(8.0 / 2**0.5)}
    assert main(["doctor", str(recipe), *changes]) == 0
    printed = capsys.readouterr().out
    assert shlex.join(told["arguments"]) in printed
    assert "first update" in printed
    assert parse_changes(["rank=16", "scaling=alpha/rank"]) == {"rank": 16, "scaling": "alpha/rank"}
    assert main(["doctor", str(recipe), "--convert", "rank"]) == 2
