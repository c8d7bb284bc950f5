"""A run states its memory plan, stops where it cannot fit, and measures what a step took."""

from contextlib import nullcontext

import pytest

from loralab.errors import PlanError
from loralab.events import Note
from loralab.measuring.memory import Watched
from loralab.planning import devices
from loralab.runs import forecast
from loralab.runs.train import train


def test_a_run_records_what_was_planned_and_what_was_taken(settings, tmp_path):
    told = []
    run = train(settings(training__memory_plan="stop"), tmp_path / "run", listen=told.append)
    memory = run.manifest["memory"]
    assert sum(memory["parts"].values()) == memory["predicted_bytes"]
    assert memory["measured_bytes"] > 0
    stated = [e.text for e in told if isinstance(e, Note) and e.topic == "memory-plan"]
    assert len(stated) == 1
    assert stated[0].startswith("planned peak:")


def test_a_run_that_cannot_fit_stops_with_the_levers(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_main_memory", lambda: 300_000)
    with pytest.raises(PlanError) as raised:
        train(settings(training__memory_plan="stop"), tmp_path / "run")
    assert raised.value.exit_code == 2
    assert "training.batch_size=8" in raised.value.next_step
    assert not (tmp_path / "run").exists()


def test_told_otherwise_it_warns_and_starts(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_main_memory", lambda: 300_000)
    told = []
    train(settings(training__memory_plan="warn"), tmp_path / "run", listen=told.append)
    warnings = [e for e in told if isinstance(e, Note) and e.warning and e.topic == "memory-plan"]
    assert len(warnings) == 1


def test_a_plan_that_is_further_off_than_its_error_bar_is_told(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "SLACK_BYTES", 0)
    monkeypatch.setattr(forecast, "watch_peak", lambda device: nullcontext(Watched(2**30)))
    told = []
    one = settings(training__memory_plan="stop", training__epochs=1)
    run = train(one, tmp_path / "run", listen=told.append)
    warned = [e.text for e in told if isinstance(e, Note) and e.warning and "error bar" in e.text]
    assert len(warned) == 1
    assert "the plan said" in warned[0]
    assert run.manifest["memory"]["error"] < -0.9
