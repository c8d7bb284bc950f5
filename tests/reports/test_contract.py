"""The contract between the rooms: what evidence builds, this room shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.evidence import MethodResult, RatePoint, SeedPredictions, TestSet, build_comparison
from loralab.reports import formats

from . import sample
from .pages import comparison_page


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_the_evidence_rooms_comparison_fits(tmp_path: Path, task: str) -> None:
    comparison = _built_comparison(task)
    page = comparison_page(tmp_path, comparison)
    sections = {attributes["id"] for attributes in page.of("section")}
    both = {"methods", "differences", "rates", "cost", "seeds", "economy", "disagreements"}
    assert both <= sections
    assert ("classes" in sections) == (task == "classification")
    assert "30 rows, 15 documents" in page.text
    assert "1e-1 diverged" in page.text
    captions = ("Each seed's run", "McNemar's test", "Storage for 10 tasks")
    assert all(caption in page.text for caption in captions)
    lora = next(row for row in comparison["methods"] if row["method"] == "lora")
    seed = lora["per_seed"][0]
    assert f"{seed['nll']:.4f}" in page.text
    efficiency = comparison["parameter_efficiency"]["rows"][0]["accuracy_per_million_parameters"]
    assert f"{efficiency:.2f}" in page.text
    stored = comparison["storage"]["rows"][0]["total_bytes"]
    assert formats.data_size(stored).replace("\N{NO-BREAK SPACE}", " ") in page.text
    test = comparison["mcnemar"][0]
    assert f"lora − full 0 {test['only_a']} {test['only_b']} {test['p']:.3f}" in page.text
    first = comparison["disagreements"][0]
    answer = first["predictions"]["lora"]
    assert f"lora {answer['prediction_name']}" in page.text
    assert f"loss {answer['nll']:.2f}" in page.text
    if task == "classification":
        cells = lora["confusion_matrix"][0]
        assert f"negative {cells[0]} {100 * cells[0] / sum(cells):.1f} %" in page.text


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
