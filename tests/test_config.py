"""Settings: everything wrong is said at once; what is written is read back."""

import tomllib

import pytest

from loralab.config import load_config, parse_config, shipped_recipes
from loralab.errors import ConfigError

MINIMAL = {"model": {"name": "minilm"}, "data": {"name": "tweets"}}


def test_all_faults_are_reported_at_once_with_the_nearest_name(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[model]\nname = "minilm"\nnum_lables = 2\n[data]\nname = "tweets"\n'
        '[training]\nbatch_size = 0\nlearning_rate = "fast"\n[methd]\nrank = 8\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    text = str(caught.value)
    assert "4 faults" in text
    assert "unknown key model.num_lables; did you mean 'num_labels'?" in text
    assert "training.batch_size: input should be greater than 0 (given: 0)" in text
    assert "training.learning_rate" in text
    assert "unknown key methd; did you mean 'method'?" in text


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("method.rank=8", "method", "rank", 8),
        ("training.learning_rate=1e-3", "training", "learning_rate", 1e-3),
        ("training.learning_rate=1", "training", "learning_rate", 1.0),
        ("data.name=movie-reviews", "data", "name", "movie-reviews"),
        ('method.targets=["q_proj", "v_proj"]', "method", "targets", ["q_proj", "v_proj"]),
        ("compare.seeds=[3, 4, 5, 6]", "compare", "seeds", [3, 4, 5, 6]),
        (
            "compare.learning_rates.lora=[1e-3, 1e-2]",
            "compare",
            "learning_rates",
            {"lora": [1e-3, 1e-2]},
        ),
        ("training.fused=false", "training", "fused", False),
    ],
)
def test_overrides_are_read_as_toml_values(tmp_path, override, section, key, value):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "minilm"\n[data]\nname = "tweets"\n')
    config = load_config(recipe, [override])
    assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("override", ["rank=8", "method.rank", "=3", "method.=3"])
def test_a_malformed_override_says_its_form(tmp_path, override):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "minilm"\n[data]\nname = "tweets"\n')
    with pytest.raises(ConfigError, match=r"not of the form section.key=value"):
        load_config(recipe, [override])


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_complete_and_survive_writing(name):
    config = load_config(name)
    assert parse_config(tomllib.loads(config.to_toml())) == config


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"no recipe 'dmo'.*demo"):
        load_config("dmo")


def test_a_recipe_that_is_no_toml_or_no_utf8(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(broken)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('[model]\nname = "caf\xe9"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(latin)


def test_settings_are_frozen_and_replaced_checked():
    config = parse_config(MINIMAL)
    assert config.replace(method__rank=4).method.rank == 4
    with pytest.raises(ConfigError, match=r"method\.rank"):
        config.replace(method__rank=0)
    with pytest.raises(Exception, match="frozen"):
        config.method.rank = 3  # type: ignore[misc]  (the point of the test)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"methods": ["lora"]}, "at least two different methods"),
        ({"seeds": [0, 1]}, "at least 3 items"),
        ({"seeds": [0, 1, 1]}, "a seed twice"),
        ({"learning_rates": {"lora": [0.0]}}, "greater than 0"),
    ],
)
def test_a_contest_that_proves_nothing_is_refused(compare, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, "compare": compare})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("method.rank_pattern.q_proj=8", "rank_pattern", {"v_proj": 2, "q_proj": 8}),
        (
            r"method.rank_pattern.'layers\.0\.(?=x).*'=8",
            "rank_pattern",
            {"v_proj": 2, r"layers\.0\.(?=x).*": 8},
        ),
        ("method.rank_pattern={q_proj = 8}", "rank_pattern", {"q_proj": 8}),
        ('method.alpha_pattern."a.b" = 3', "alpha_pattern", {"a.b": 3.0}),
        ("method.token_rows.embed_tokens=[7, 8]", "token_rows", {"embed_tokens": [7, 8]}),
        ("method.layers=0-2, 5", "layers", [0, 1, 2, 5]),
        ("method.layers=[3]", "layers", [3]),
        ("method.init=lora_ga", "init", "lora_ga"),
    ],
)
def test_tables_lists_and_ranges_are_overridden(tmp_path, override, key, value):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[model]\nname = "m"\n[data]\nname = "tweets"\n[method.rank_pattern]\nv_proj = 2\n'
    )
    config = load_config(recipe, [override])
    assert getattr(config.method, key) == value
    assert parse_config(tomllib.loads(config.to_toml())) == config


def test_every_fault_of_a_method_is_named():
    method = {
        "init": "kaimng",
        "targets": 3,
        "layers": "3-1",
        "rank_pattern": {"q(": 4, "v": 0},
        "alpha_pattern": {"v": -1.0},
        "biases": "some",
        "token_rows": {"e": [-1]},
        "loraplus_ratio": 4,
    }
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "method": method})
    for words in (
        "9 faults",
        "method.init: unknown value 'kaimng'; did you mean 'kaiming'?",
        'method.targets: give "all-linear", a regular expression, or a list of names (given: 3)',
        "method.layers: give block numbers",
        "method.rank_pattern.q(: no regular expression",
        "method.rank_pattern.v: input should be greater than 0",
        "method.alpha_pattern.v: input should be greater than 0",
        "method.biases: unknown value 'some'; known: all, none, targets",
        "method.token_rows.e.0: input should be greater than or equal to 0",
        "unknown key method.loraplus_ratio; did you mean 'loraplus_lr_ratio'?",
    ):
        assert words in str(caught.value)


def test_an_expression_in_double_quotes_is_explained(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "m"\n[data]\nname = "tweets"\n')
    with pytest.raises(ConfigError, match="single quotes"):
        load_config(recipe, [r'method.rank_pattern."layers\.0"=8'])


def test_recipes_reach_every_setting_of_an_adapter():
    from dataclasses import fields

    from loralab.adapters import LoRAConfig
    from loralab.adapters.settings import DATA_DRIVEN
    from loralab.config import Initialisation, MethodSection
    from loralab.lowrank import INITIALISERS

    assert {field.name for field in fields(LoRAConfig)} <= set(MethodSection.model_fields)
    assert set(Initialisation.__args__) == {*INITIALISERS, *DATA_DRIVEN}
