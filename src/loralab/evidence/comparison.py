"""Seeds' predictions of several methods -> `comparison.json`: figures, differences, a verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab.errors import DataError
from loralab.evidence.contest import Contest, Pair, hold_contest
from loralab.evidence.costs import cost_quality, parameter_efficiency, storage
from loralab.evidence.results import MethodResult, SeedPredictions, TestSet
from loralab.evidence.verdict import Standing, write_verdict
from loralab.measuring import (
    classification_metrics,
    completion_metrics,
    mcnemar,
)

_OF_THE_TEST_SET = {"rows", "documents", "seeds"}  # the same for all methods, told once


def build_comparison(
    results: Sequence[MethodResult],
    test: TestSet,
    *,
    data_facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    base_bytes: int,
    storage_tasks: int,
    num_disagreements: int = 6,
) -> dict[str, Any]:
    """Everything the contest says, as plain data that `json.dumps` takes.

    `data_facts` (rows and documents of each split) and `settings` are copied in. `base_bytes` is
    the stored base model, `storage_tasks` the N of the storage sum.

    Accuracy decides in classification, log-likelihood in causal tasks; the other measure can only
    take a win away. There is no winner unless every method's best rate is bracketed.

    Raises `DataError`, with all faults found, for results that do not fit the test set.
    """
    _check(results, test)
    measured = [result for result in results if _is_measured(result)]
    contest = _contest(measured, test)
    open_ends = {result.method: reason for result in results if (reason := _open_end(result))}
    winner = None if open_ends else contest.winner
    methods = [_describe_method(result, test) for result in results]
    for entry in methods:
        rivals = contest.primary_pairs and entry["method"] in contest.methods
        entry["detectable_lead"] = contest.detectable_lead(entry["method"]) if rivals else None
    standing = Standing(
        contest=contest,
        winner=winner,
        open_ends=open_ends,
        accuracy={
            entry["method"]: entry["accuracy"]["mean"] for entry in methods if entry["seeds"]
        },
        nll={entry["method"]: entry["nll"]["mean"] for entry in methods if entry["seeds"]},
        num_rows=len(test.ids),
        num_documents=test.num_documents,
        num_seeds=sorted({len(result.seeds) for result in measured}),
        steps=sorted({result.steps for result in measured}),
        constant=_constant_methods(measured, test),
    )
    return {
        "task": "causal" if test.labels is None else "classification",
        "primary": contest.primary,
        "winner": winner,
        "verdict": write_verdict(standing),
        "steps": max(result.steps for result in results),
        "data": {
            "rows": {"test": len(test.ids)},
            "documents": {"test": test.num_documents},
            **data_facts,
            "test_rows": len(test.ids),
            "test_documents": test.num_documents,
            "label_names": None if test.label_names is None else list(test.label_names),
        },
        "methods": methods,
        "pairs": [_describe_pair(pair) for pair in contest.accuracy],
        "nll_pairs": [_describe_pair(pair) for pair in contest.nll],
        "mcnemar": _mcnemar_by_seed(measured, test),
        "disagreements": _disagreements(measured, test, num_disagreements),
        "cost_quality": cost_quality(methods),
        "parameter_efficiency": parameter_efficiency(methods),
        "storage": storage(results, base_bytes, storage_tasks),
        "settings": dict(settings),
    }


def _check(results: Sequence[MethodResult], test: TestSet) -> None:
    faults = []
    num_rows = len(test.ids)
    if len({result.method for result in results}) < max(len(results), 2):
        faults.append("a comparison needs at least two methods, each with its own name")
    if test.num_documents < 2:
        faults.append("the test set has fewer than two documents: no interval is possible")
    if len(test.groups) != num_rows or (test.labels is not None and len(test.labels) != num_rows):
        faults.append("the test set's ids, groups and labels differ in number")
    if (test.labels is None) != (test.label_names is None):
        faults.append("the test set has labels without names, or names without labels")
    for result in results:
        faults += [
            f"{result.method}, seed {run.seed}: {len(run.predictions)} predictions and"
            f" {len(run.nll)} log-likelihoods for {num_rows} test rows"
            for run in result.seeds
            if len(run.predictions) != num_rows or len(run.nll) != num_rows
        ]
        if test.label_names is not None:
            faults += [
                f"{result.method}, seed {run.seed}: a prediction is none of the"
                f" {len(test.label_names)} labels"
                for run in result.seeds
                if not np.isin(run.predictions, np.arange(len(test.label_names))).all()
            ]
        if len(result.seeds) == 1:
            faults.append(f"{result.method}: one seed says nothing of the spread between seeds")
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise DataError(
            f"the results cannot be compared\n{listed}",
            "run each method with at least two seeds on the same test rows.",
        )


def _is_measured(result: MethodResult) -> bool:
    return bool(result.seeds) and all(np.isfinite(run.nll).all() for run in result.seeds)


def _open_end(result: MethodResult) -> str | None:
    """Why this method might do better than it did, so that nobody can win; None if it might not."""
    if not result.seeds:
        return f"none of {result.method}'s learning rates gave a finite loss"
    if not _is_measured(result):
        lost = ", ".join(str(run.seed) for run in result.seeds if not np.isfinite(run.nll).all())
        return f"{result.method} diverged at its best rate with seed {lost}"
    if not result.bracketed:
        return (
            f"{result.method}'s best learning rate, {result.best_learning_rate:g}, lies on the edge"
            " of its grid"
        )
    return None


def _truth(test: TestSet) -> np.ndarray:
    """What a right prediction is; in a causal task predictions already say whether they match."""
    return np.ones(len(test.ids), dtype=int) if test.labels is None else test.labels


def _correct(run: SeedPredictions, test: TestSet) -> np.ndarray:
    return run.predictions == _truth(test)


def _contest(measured: Sequence[MethodResult], test: TestSet) -> Contest:
    correct = {r.method: np.stack([_correct(run, test) for run in r.seeds]) for r in measured}
    nll = {r.method: np.stack([run.nll for run in r.seeds]) for r in measured}
    primary = "nll" if test.labels is None else "accuracy"
    return hold_contest(correct, nll, test.documents, primary)


def _describe_method(result: MethodResult, test: TestSet) -> dict[str, Any]:
    return {
        "method": result.method,
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "learning_rates": _describe_rates(result),
        "best_learning_rate": result.best_learning_rate,
        "bracketed": result.bracketed,
        "seeds": [run.seed for run in result.seeds] if _is_measured(result) else [],
        "steps": result.steps,
        "peak_bytes": result.peak_bytes,
        "step_seconds": result.step_seconds,
        "artifact_bytes": result.artifact_bytes,
        "open_end": _open_end(result),
        **_describe_quality(result, test),
    }


def _describe_rates(result: MethodResult) -> list[dict[str, Any]]:
    finite = [
        {
            "learning_rate": point.learning_rate,
            "validation_nll": point.validation_nll,
            "validation_accuracy": point.validation_accuracy,
            "run": point.run,
            "diverged": False,
        }
        for point in result.rates
        if point.learning_rate not in result.diverged_rates and np.isfinite(point.validation_nll)
    ]
    known = {point["learning_rate"] for point in finite}
    lost = {*result.diverged_rates, *(point.learning_rate for point in result.rates)} - known
    runs = {point.learning_rate: point.run for point in result.rates}
    diverged = [
        {
            "learning_rate": rate,
            "validation_nll": None,
            "validation_accuracy": None,
            "run": runs.get(rate),
            "diverged": True,
        }
        for rate in lost
    ]
    return sorted(finite + diverged, key=lambda point: point["learning_rate"])


def _describe_quality(result: MethodResult, test: TestSet) -> dict[str, Any]:
    if not _is_measured(result):
        return {"accuracy": None, "nll": None, "per_seed": []}
    predictions = np.stack([run.predictions for run in result.seeds])
    nll = np.stack([run.nll for run in result.seeds])
    if test.labels is None or test.label_names is None:
        figures = completion_metrics(predictions == 1, nll, groups=test.documents)
    else:
        names = test.label_names
        figures = classification_metrics(test.labels, predictions, nll, len(names), test.documents)
        figures["per_class"] = [
            {**entry, "name": names[entry["label"]]} for entry in figures["per_class"]
        ]
    figures["per_seed"] = [
        {"seed": run.seed, **entry}
        for run, entry in zip(result.seeds, figures["per_seed"], strict=True)
    ]
    return {key: value for key, value in figures.items() if key not in _OF_THE_TEST_SET}


def _describe_pair(pair: Pair) -> dict[str, Any]:
    return {
        "a": pair.a,
        "b": pair.b,
        "difference": pair.difference.value,
        "low": pair.difference.low,
        "high": pair.difference.high,
        "p": pair.p,
        "p_raw": pair.difference.p,
        "detectable_difference": pair.detectable_difference,
        "standard_error": pair.difference.standard_error,
        "degrees_of_freedom": pair.difference.degrees_of_freedom,
        "better": pair.better,
    }


def _mcnemar_by_seed(measured: Sequence[MethodResult], test: TestSet) -> list[dict[str, Any]]:
    """One table a pair and shared seed; never pooled, and no part of the verdict."""
    tables = []
    for index, first in enumerate(measured):
        for second in measured[index + 1 :]:
            runs = {run.seed: run for run in second.seeds}
            for run in first.seeds:
                if run.seed in runs:
                    result = mcnemar(_correct(run, test), _correct(runs[run.seed], test))
                    tables.append(
                        {
                            "a": first.method,
                            "b": second.method,
                            "seed": run.seed,
                            "only_a": result.only_a,
                            "only_b": result.only_b,
                            "p": result.p_exact,
                            "p_mid": result.p_mid,
                        }
                    )
    return tables


def _constant_methods(measured: Sequence[MethodResult], test: TestSet) -> list[str]:
    """Methods that gave every row the same label, with every seed."""
    if test.labels is None:
        return []
    return [
        result.method
        for result in measured
        if all(len(np.unique(run.predictions)) == 1 for run in result.seeds)
    ]


def _disagreements(
    measured: Sequence[MethodResult], test: TestSet, most: int
) -> list[dict[str, Any]]:
    """Rows on which the methods' majority predictions differ, widest log-likelihood gap first."""
    if len(measured) < 2:
        return []
    votes = np.stack([_majority(result) for result in measured])
    nll = np.stack([np.mean([run.nll for run in r.seeds], axis=0) for r in measured])
    differing = np.flatnonzero((votes != votes[0]).any(axis=0))
    gap = np.ptp(nll[:, differing], axis=0)
    chosen = differing[np.argsort(-gap, kind="stable")][:most]
    return [
        {
            "id": test.ids[row],
            "label": None if test.labels is None else int(test.labels[row]),
            "label_name": None if test.labels is None else _name(int(test.labels[row]), test),
            "predictions": {
                result.method: {
                    "prediction": int(votes[index, row]),
                    "prediction_name": _name(int(votes[index, row]), test),
                    "correct": bool(votes[index, row] == _truth(test)[row]),
                    "nll": float(nll[index, row]),
                }
                for index, result in enumerate(measured)
            },
        }
        for row in chosen
    ]


def _name(prediction: int, test: TestSet) -> str:
    if test.label_names is None:
        return "exact match" if prediction == 1 else "no match"
    return test.label_names[prediction]


def _majority(result: MethodResult) -> np.ndarray:
    """Each row's most frequent prediction over seeds; the smaller label where it is a tie."""
    predictions = np.stack([run.predictions for run in result.seeds])
    counts = np.stack([(predictions == label).sum(0) for label in range(predictions.max() + 1)])
    return counts.argmax(axis=0)
