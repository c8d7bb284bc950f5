"""What a plan answers: what fits, which levers, at which speed; and what it refuses."""

import json

import pytest
from plan_settings import settings

from loralab.cli import main
from loralab.errors import ModelError, PlanError
from loralab.planning import (
    Planner,
    find_device,
    largest,
    levers,
    plan_serving,
    speed_of,
    step_seconds,
)
from loralab.planning.solve import SETTINGS, Quantity
from loralab.reports import write_plan_report
from loralab.runs.plan import plan


@pytest.fixture
def small(config_file):
    path = config_file("llama", num_hidden_layers=2)
    return settings(path, model__task="causal", training__batch_size=4)


@pytest.mark.parametrize(
    "quantity",
    ["rank", *(pytest.param(q, marks=pytest.mark.slow) for q in ("batch_size", "max_tokens"))],
)
def test_the_largest_fits_and_one_more_does_not(config_file, quantity: Quantity):
    path = config_file("llama", max_position_embeddings=100_000, num_hidden_layers=2)
    config = settings(path, model__task="causal")
    planner = Planner(find_device("340MiB"))
    most = largest(planner, config, quantity)
    key = SETTINGS[quantity]
    assert planner.plan(config.replace(**{key: most}), quick=True).fits
    assert not planner.plan(config.replace(**{key: most + 1}), quick=True).fits


def test_nothing_fits_a_device_without_room(small):
    assert largest(Planner(find_device("20MiB")), small, "batch_size") == 0


def test_rows_are_no_longer_than_the_model_takes(small):
    assert largest(Planner(find_device("h100")), small, "max_tokens") == 512


def test_levers_are_sorted_and_save_what_they_say(small):
    planner = Planner(find_device("a10"), "peft")
    made = planner.plan(small, quick=True)
    found = levers(planner, made)
    saved = [lever.saves_bytes for lever in found]
    assert saved == sorted(saved, reverse=True)
    assert all(lever.cost for lever in found)
    assert {"bfloat16", "half the length", "no adapter dropout"} <= {one.name for one in found}
    one = next(lever for lever in found if lever.name == "no adapter dropout")
    pulled = planner.plan(small.replace(method__dropout=0.0), quick=True)
    assert made.peak_bytes - pulled.peak_bytes == one.saves_bytes


def test_serving_adds_up(small):
    made = plan_serving(small, find_device("a10"), num_adapters=5)
    heads, width, layers = 2, 16, 2
    assert made.cache_bytes == 2 * 4 * 48 * heads * width * layers * 4
    assert made.separate_bytes == made.base_bytes + 5 * made.adapter_bytes + made.cache_bytes
    assert made.merged_bytes == 5 * made.base_bytes + made.cache_bytes


def test_the_seeds_storage_sum_at_real_bytes_a_parameter():
    config = settings("llama-2-7b", model__task="causal", model__dtype="bfloat16", method__rank=16)
    made = plan_serving(config, find_device("a100-80"), num_adapters=10)
    assert made.to_dict()["storage_models_bytes"] == pytest.approx(10 * 6.74e9 * 2, rel=0.01)
    assert made.adapter_bytes == 39_976_960 * 2
    assert made.storage_saved_share == pytest.approx(0.894, abs=0.002)


def test_a_known_device_has_a_speed_and_a_mere_size_has_none(small):
    made = Planner(find_device("a10")).plan(small, quick=True)
    speed = speed_of(find_device("a10"), "float32")
    assert speed is not None
    assert 0 < step_seconds(made.accounts, speed) < 1
    assert speed_of(find_device("16GiB"), "float32") is None


def test_matrix_work_is_two_for_each_weight_and_token_forward_and_twice_back(config_file):
    path = config_file("llama", num_hidden_layers=2)
    config = settings(path, method__kind="full", training__batch_size=8)
    flops = Planner(find_device("a10")).plan(config, quick=True).accounts.flops
    weights = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160
    attention = 2 * 48 * 64  # each token with each, in all heads, twice
    assert flops == pytest.approx(6 * 2 * (weights + attention) * 8 * 48, rel=0.05)


def test_an_unknown_device_gets_the_nearest_name():
    with pytest.raises(PlanError, match="did you mean 'a100-80'"):
        find_device("a100-88")


def test_a_device_of_nothing_is_refused():
    with pytest.raises(PlanError, match="holds nothing"):
        find_device("0GiB")


def test_an_unknown_model_gets_the_nearest_name():
    with pytest.raises(ModelError, match=r"did you mean 'llama-3\.2-1b'"):
        Planner(find_device("a10")).plan(settings("llama-3.2-1bb"))


def test_all_faults_of_a_configuration_are_told_at_once(config_file):
    path = config_file("llama", hidden_size="", num_attention_heads="", vocab_size=0)
    with pytest.raises(ModelError) as raised:
        Planner(find_device("a10")).plan(settings(path))
    for part in ("hidden_size is missing", "num_attention_heads is missing", "vocab_size is 0"):
        assert part in str(raised.value)


@pytest.mark.parametrize("override", ["training.batch_size=0", "data.max_tokens=-1"])
def test_sizes_of_zero_or_below_are_refused(override, capsys):
    assert main(["plan", "--model", "gpt2", "--device", "a10", override, "--json"]) == 2
    assert override.partition("=")[0] in capsys.readouterr().out


def test_without_peft_its_step_is_a_named_error(small, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="PEFT is not installed"):
        Planner(find_device("a10"), "peft").plan(small)


def test_a_plan_needs_a_recipe_or_a_model(capsys):
    assert main(["plan", "--device", "a10"]) == 2
    assert "no recipe and no model" in capsys.readouterr().err


def test_the_command_line_speaks_json(config_file, capsys):
    model = config_file("bert", num_hidden_layers=2)
    arguments = ["plan", "--model", model, "--device", "400MiB", "--json"]
    assert main([*arguments, "training.batch_size=2", "data.max_tokens=32"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {
        "peak_bytes",
        "phase",
        "parts",
        "error_bar",
        "device",
        "capacity_bytes",
        "fits",
        "levers",
        "max_batch_size",
        "flops_per_step",
        "seconds_per_step",
    } <= document.keys()
    assert sum(document["parts"].values()) == document["peak_bytes"]
    assert max(point["bytes"] for point in document["timeline"]) == document["peak_bytes"]


@pytest.mark.slow
def test_details_show_methods_serving_and_a_page(config_file, tmp_path):
    config = settings(config_file("bert", num_hidden_layers=2))
    page = tmp_path / "plan.html"
    document = plan(config, device="400MiB", output=page)
    assert [row["method"] for row in document["methods"]] == ["lora", "frozen", "full", "head"]
    assert document["serving"]["num_adapters"] == 10
    assert document["max_rank"] > 0
    assert "What holds the peak" in page.read_text(encoding="utf-8")


def test_a_page_needs_no_more_than_a_timeline(tmp_path):
    page = tmp_path / "plan.html"
    points = [
        {"moment": moment, "bytes": 30 * size, "parts": {"weights": 20 * size, "<b>": 10 * size}}
        for moment, size in (("forward", 2**20), ("backward", 2**21))
    ]
    write_plan_report({"model": "tiny", "timeline": points, "capacity_bytes": 2**26}, page)
    text = page.read_text(encoding="utf-8")
    assert "The highest moment of each stretch" in text
    assert "weights 20.0" in text


def test_the_terminal_shows_the_answer_first(config_file, capsys):
    model = config_file("gpt2", n_layer=2)
    assert main(["plan", "--model", model, "--device", "400MiB", "--quiet"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "fits 400MiB" in first
