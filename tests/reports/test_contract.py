"""The contract between the rooms: what evidence builds, this room shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.evidence import MethodResult, RatePoint, SeedPredictions, TestSet, build_comparison

from . import sample
from .pages import comparison_page


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_the_evidence_rooms_comparison_fits(tmp_path: Path, task: str) -> None:
    page = comparison_page(tmp_path, _built_comparison(task))
    sections = {attributes["id"] for attributes in page.of("section")}
    both = {"methods", "differences", "rates", "cost", "seeds", "economy", "disagreements"}
    assert both <= sections
    assert ("classes" in sections) == (task == "classification")
    assert "a coin flip with one parameter" in page.text
    assert "30 rows, 15 documents" in page.text
    assert "diverged" in page.text


def _built_comparison(task: str) -> dict[str, Any]:
    chance = np.random.default_rng(3)
    labels = chance.integers(0, 2, 30)
    results = [
        MethodResult(
            method=method,
            trainable_parameters=1000,
            total_parameters=100_000,
            rates=tuple(RatePoint(rate, 0.5 + rate, 0.8, "run") for rate in (1e-4, 1e-3, 1e-2)),
            best_learning_rate=1e-3,
            bracketed=True,
            seeds=tuple(
                SeedPredictions(seed, chance.integers(0, 2, 30), chance.uniform(0.1, 1, 30))
                for seed in range(3)
            ),
            peak_bytes=10_000_000,
            step_seconds=0.1,
            artifact_bytes=4096,
            artifact_needs_base=True,
            steps=50,
            diverged_rates=(1e-1,),
        )
        for method in ("lora", "full")
    ]
    test = TestSet(
        ids=tuple(f"row-{i}" for i in range(30)),
        groups=tuple(f"document-{i // 2}" for i in range(30)),
        labels=labels if task == "classification" else None,
        label_names=("negative", "positive") if task == "classification" else None,
    )
    return build_comparison(
        results,
        test,
        data_facts={"name": "reviews"},
        settings=sample.settings(),
        base_bytes=400_000,
        storage_tasks=10,
    )
