"""What each method costs beside what it scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.evidence.results import MethodResult

COSTS = ("trainable_parameters", "peak_bytes", "step_seconds", "artifact_bytes")


def cost_quality(methods: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A point a measured method: its costs, accuracy and log-likelihood."""
    return [
        {
            "method": entry["method"],
            **{cost: entry[cost] for cost in COSTS},
            "accuracy": entry["accuracy"],
            "nll": entry["nll"],
        }
        for entry in methods
        if entry["seeds"]
    ]


def parameter_efficiency(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy per million trainable parameters, and why it ranks nothing."""
    rows = [
        {
            "method": entry["method"],
            "accuracy_per_million_parameters": entry["accuracy"]["mean"]
            / entry["trainable_parameters"]
            * 1e6,
        }
        for entry in methods
        if entry["seeds"] and entry["trainable_parameters"]
    ]
    coin = 0.5 * 1e6
    return {
        "rows": rows,
        "refutation": (
            "Accuracy divided by trainable parameters measures no quality: by it a coin flip with"
            f" one parameter, at {coin:,.0f} per million, beats every method here."
        ),
    }


def storage(results: Sequence[MethodResult], base_bytes: int, num_tasks: int) -> dict[str, Any]:
    """Bytes to keep `num_tasks` tasks: whole models N times, or one base and N small artifacts."""
    rows = [
        {
            "method": result.method,
            "artifact_bytes": result.artifact_bytes,
            "needs_base": result.artifact_needs_base,
            "total_bytes": result.artifact_needs_base * base_bytes
            + num_tasks * result.artifact_bytes,
        }
        for result in results
    ]
    return {
        "tasks": num_tasks,
        "base_bytes": base_bytes,
        "full_models_bytes": num_tasks * base_bytes,
        "rows": rows,
    }
