"""`loralab lint`: would the conclusion of these runs, this recipe or description survive?"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from loralab.config import MethodKind, RunConfig, load_config, parse_config, read_recipe
from loralab.errors import ConfigError, RunError
from loralab.evidence.linting import RULES, Arm, Claim, Data, Experiment, lint, parse_description
from loralab.runs.folder import CONFIG, MANIFEST, Run, open_run

COMPARISON = "comparison.json"
DESCRIPTIONS = resources.files("loralab") / "recipes" / "experiments"


def lint_sources(sources: Sequence[str]) -> dict[str, Any]:
    """What the rules find in run folders, a comparison's folder, a recipe or a description.

    Several sources must all be runs. Returns title, findings (errors first), their counts by level
    and the names of the rules that looked. Raises `ConfigError` or `RunError` for what is none.
    """
    experiment = read_experiment(sources)
    findings = lint(experiment)
    counts = Counter(finding.level for finding in findings)
    return {
        "title": experiment.title,
        "arms": [arm.name for arm in experiment.arms],
        "findings": [asdict(finding) for finding in findings],
        "counts": {level: counts[level] for level in ("error", "warning", "info")},
        "rules": sorted(RULES),
    }


def finding_lines(document: dict[str, Any]) -> str:
    """The findings as text: what, by which numbers, and what to do."""
    lines = [f"{document['title']}: {', '.join(document['arms'])}", ""]
    for found in document["findings"]:
        lines += [
            f"{found['level']}: {found['message']}  [{found['name']}]",
            f"    {found['evidence']}",
            f"    Next: {found['next_step']}",
        ]
    counts = document["counts"]
    told = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n)
    rules = f"{len(document['rules'])} rules"
    lines += ["", f"{told} ({rules})" if told else f"nothing found ({rules})"]
    return "\n".join(lines)


def read_experiment(sources: Sequence[str]) -> Experiment:
    """The experiment that the sources are of."""
    first = Path(sources[0])
    if len(sources) > 1 or (first / MANIFEST).is_file():
        return of_runs([open_run(source) for source in sources])
    if (first / COMPARISON).is_file():
        document = json.loads((first / COMPARISON).read_text(encoding="utf-8"))
        return of_comparison(document, load_config(first / CONFIG), str(first))
    if first.is_dir():
        folders = sorted(file.parent for file in first.glob(f"**/{MANIFEST}"))
        if not folders:
            raise RunError(
                f"{first} holds no run and no comparison",
                "give run folders, a comparison's folder, a recipe or a description.",
            )
        return of_runs([open_run(folder) for folder in folders])
    return _of_tables(sources[0])


def _of_tables(source: str) -> Experiment:
    shipped = DESCRIPTIONS / f"{source}.toml"
    described = sorted(f.name.removesuffix(".toml") for f in DESCRIPTIONS.iterdir())
    if not Path(source).is_file() and source in described:
        tables = read_recipe(str(shipped))
    else:
        try:
            tables = read_recipe(source)
        except ConfigError as error:
            raise ConfigError(
                f"{error.cause}; nor one of the described experiments ({', '.join(described)})",
                error.next_step,
            ) from None
    if "arms" in tables:
        return parse_description(tables, source)
    return of_recipe(parse_config(tables, source), source)


def of_recipe(config: RunConfig, title: str) -> Experiment:
    """A comparison that has not been run yet."""
    config.model.check_reads_text()
    rates = config.compare.learning_rates
    arms = [
        _arm(config, method).model_copy(
            update={
                "rates_tried": rates.get(method),
                "seeds": list(config.compare.seeds),
                "data_order": "shared",
            }
        )
        for method in config.compare.methods
    ]
    return _experiment(title, config, arms, [])


def of_comparison(comparison: dict[str, Any], config: RunConfig, title: str) -> Experiment:
    """A finished comparison; its claim is its winner, where it has one."""
    order = comparison.get("order_hash")
    arms = [_arm_of_comparison(config, told, order) for told in comparison["methods"]]
    claims = []
    if comparison["winner"] is not None:
        claims = [Claim(kind="difference", text=comparison["verdict"], tested=True)]
    rows = comparison["data"]["test_rows"]
    return _experiment(title, config, arms, claims, test_rows=rows)


def _arm_of_comparison(config: RunConfig, told: dict[str, Any], order: str | None) -> Arm:
    return _arm(config, told["method"]).model_copy(
        update={
            "trainable_parameters": told["trainable_parameters"],
            "total_parameters": told["total_parameters"],
            "learning_rate": told["best_learning_rate"],
            "rates_tried": [point["learning_rate"] for point in told["learning_rates"]],
            "seeds": told["seeds"] or None,
            "steps": told["steps"] or None,
            "accuracy": (told["accuracy"] or {}).get("mean"),
            "data_order": order,
        }
    )


def of_runs(runs: Sequence[Run]) -> Experiment:
    """Runs that only differ in seed and learning rate are one arm."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        run.config.model.check_reads_text()
        groups.setdefault(_settings_key(run), []).append(run)
    shared = set.intersection(*({_seed(run) for run in group} for group in groups.values()))
    arms = [_arm_of_runs(group, shared) for group in groups.values()]
    arms = _with_names(arms, [_settings(group[0]) for group in groups.values()])
    ranked = sorted((a for a in arms if a.accuracy is not None), key=lambda a: -(a.accuracy or 0))
    claims = []
    if len(ranked) > 1:
        text = f"{ranked[0].name} is ahead of {ranked[1].name}"
        claims = [Claim(kind="difference", text=text, arm=ranked[0].name, against=ranked[1].name)]
    title = ", ".join(str(run.folder) for run in runs[:3]) + (", ..." if len(runs) > 3 else "")
    return _experiment(
        title,
        runs[0].config,
        arms,
        claims,
        test_rows=next((_test_rows(run) for run in runs if run.has_evaluation("test")), None),
        predictions_saved=all(run.has_evaluation("test") for run in runs if run.finished),
    )


def _settings(run: Run) -> dict[str, Any]:
    """Setting -> value, of all that makes runs different arms."""
    tables = run.config.model_dump(exclude={"compare"})
    for key in ("seed", "learning_rate", "head_learning_rate", "threads", "device"):
        tables["training"].pop(key)
    return {f"{table}.{key}": value for table in tables for key, value in tables[table].items()}


def _settings_key(run: Run) -> str:
    return json.dumps(_settings(run), sort_keys=True, default=str)


def _arm_of_runs(runs: Sequence[Run], shared_seeds: set[int]) -> Arm:
    """One arm from its runs: the best rate by validation, its seeds, its mean accuracy."""
    finished = [run for run in runs if run.finished]
    losses: dict[float, list[float]] = {}
    for run in finished:
        losses.setdefault(run.config.training.learning_rate, []).append(
            float(run.manifest["best"]["nll"])
        )
    best = min(losses, key=lambda rate: fmean(losses[rate]), default=None)
    at_best = [run for run in finished if run.config.training.learning_rate == best] or list(runs)
    tested = [run.metrics("test")["metrics"] for run in at_best if run.has_evaluation("test")]
    means = [metrics["accuracy"]["mean"] for metrics in tested if "accuracy" in metrics]
    same_seed = [run for run in at_best if _seed(run) in shared_seeds]
    first, training = at_best[0], at_best[0].config.training
    return _arm(first.config, first.config.method.kind).model_copy(
        update={
            "trainable_parameters": first.manifest["trainable_parameters"],
            "total_parameters": first.manifest["total_parameters"],
            "learning_rate": training.learning_rate,
            "head_learning_rate": training.head_learning_rate or training.learning_rate,
            "rates_tried": sorted({run.config.training.learning_rate for run in runs}),
            "seeds": sorted({_seed(run) for run in at_best}),
            "steps": first.manifest.get("steps"),
            "data_order": min(same_seed, key=_seed).manifest.get("order_hash")
            if same_seed
            else None,
            "accuracy": fmean(means) if means else None,
        }
    )


def _with_names(arms: Sequence[Arm], settings: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """Arms whose methods are the same also get the settings that they differ in."""
    named = []
    for arm, own in zip(arms, settings, strict=True):
        others = [o for a, o in zip(arms, settings, strict=True) if a.name == arm.name]
        differ = [key for key in own if any(other[key] != own[key] for other in others)]
        told = [f"{key.partition('.')[2]} {own[key]}" for key in differ]
        named.append(arm.model_copy(update={"name": ", ".join([arm.name, *told])}))
    return named


def _arm(config: RunConfig, method: MethodKind) -> Arm:
    """What the settings tell of one method."""
    lora, training = method == "lora", config.training
    return Arm(
        name=f"lora rank {config.method.rank}" if lora else method,
        method=method,
        stands_for="full fine-tuning" if method == "full" else None,
        frozen_layers=config.method.frozen_layers if method == "frozen" else None,
        embedding_trained=not config.method.freeze_embedding if method == "frozen" else None,
        rank=config.method.rank if lora else None,
        alpha=config.method.alpha if lora else None,
        scaling=config.method.scaling,
        adapter_dropout=config.method.dropout if lora else 0.0,
        head_dropout=config.model.head_dropout,
        head_is_new=config.model.task == "classification",
        warmup=training.warmup,
        epochs=float(training.epochs),
        batch_size=training.batch_size * training.accumulation,
        max_grad_norm=training.max_grad_norm,
        restored="best",
        dtype=None if config.model.dtype == "auto" else config.model.dtype,
        optimizer_path="fused" if training.fused else "foreach",
    )


def _experiment(
    title: str,
    config: RunConfig,
    arms: Sequence[Arm],
    claims: Sequence[Claim],
    *,
    test_rows: int | None = None,
    predictions_saved: bool = True,
) -> Experiment:
    """loralab itself chooses on validation rows, pins what it recorded and names its runs."""
    return Experiment(
        title=title,
        selected_on="validation",
        predictions_saved=predictions_saved,
        versions="pinned",
        results_found_by="name",
        data=Data(
            train_rows=config.data.train_rows,
            test_rows=test_rows or config.data.test_rows,
            max_tokens=config.data.max_tokens,
            padding="longest",
        ),
        arms=list(arms),
        claims=list(claims),
    )


def _seed(run: Run) -> int:
    return run.config.training.seed


def _test_rows(run: Run) -> int:
    return int(run.metrics("test")["rows"])
