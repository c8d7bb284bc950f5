"""What the verbs show in a terminal: rows of short text."""

from shlex import quote
from statistics import median
from typing import Any

from loralab.reports import formats
from loralab.runs.folder import Run

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def comparison_table(comparison: dict[str, Any]) -> Table:
    """One row a method: quality with intervals, then cost."""
    columns = (
        "method",
        "accuracy (95 %)",
        "nll (95 %)",
        "rate",
        "trainable",
        "peak",
        "s/step",
        "on disk",
    )
    return columns, [
        (
            row["method"],
            _interval(row["accuracy"], percent=True),
            _interval(row["nll"]),
            formats.rate(row["best_learning_rate"]) + ("" if row["bracketed"] else " (edge)"),
            formats.count(row["trainable_parameters"]),
            formats.data_size(row["peak_bytes"]),
            formats.number(row["step_seconds"], 3),
            formats.data_size(row["artifact_bytes"]),
        )
        for row in comparison["methods"]
    ]


def evaluation_table(document: dict[str, Any]) -> Table:
    """One row a figure."""
    rows = [
        (name.replace("_", " "), formats.number(figure["mean"], 4), _range(figure))
        for name, figure in figures(document["metrics"]).items()
    ]
    counts = f"{document['rows']} rows"
    return (f"{document['split']}, {counts}", "value", "95 % interval"), rows


def findings_table(findings: list[dict[str, str]]) -> Table:
    """One row a finding of the doctor."""
    rows = [
        (finding["level"], f"{finding['message']} {finding['next_step']}".strip())
        for finding in findings
    ]
    return ("level", "finding"), rows


def conversion_table(conversion: dict[str, Any]) -> Table:
    """One row a figure of a setting, before and after."""
    names = {
        "scale": "scale",
        "std_A": "std(A)",
        "learning_rate_A": "learning rate of A",
        "learning_rate_B": "learning rate of B",
        "effective_step": "effective step: scale * std(A) * rate of B",
        "first_update": "first update: rank * effective step",
        "steps_before_A_moves": "steps before A moves",
    }
    rows = [
        (name, f"{conversion['before'][key]:.4g}", f"{conversion['after'][key]:.4g}")
        for key, name in names.items()
    ]
    return ("the median module", "before", "after"), rows


def certificate_table(certificate: dict[str, Any]) -> Table:
    """One row a figure of a merge."""
    names = {
        "dtype": "dtype of the merged weights",
        "relative_error": "error over norm of the delta",
        "unchanged_share": "share of weights unchanged",
        "effect_kept": "effect kept, on probes",
        "separate_effect_kept": "effect kept by the adapter apart",
        "top1_agreement": "same first choice",
        "logit_kl": "KL of the logits (nats)",
        "adapter_sha256": "adapter",
        "base_sha256": "base",
    }
    rows = []
    for key, name in names.items():
        value = certificate[key]
        if value is not None:
            rows.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return ("merged", ""), rows


def xray_table(document: dict[str, Any]) -> Table:
    """One row a kind of module: how many directions, where, and against the base where known."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in document["xray"]["modules"]:
        kinds.setdefault(module["kind"], []).append(module)
    shares = document["figures"]["energy_by_kind"]
    has_base = any(module["base"] for group in kinds.values() for module in group)
    columns = ("module", "number", "share", "90 % in", "effective rank", "||B||/||A||")
    rows = []
    for kind, group in kinds.items():
        row = (
            kind,
            str(len(group)),
            formats.percent(shares.get(kind, 0.0), 0),
            formats.number(_middle(group, "directions_90"), 0),
            formats.number(_middle(group, "effective_rank"), 1),
            formats.number(_middle(group, "balance"), 2),
        )
        bases = [module["base"] for module in group if module["base"]]
        if has_base:
            row += (
                formats.percent(_middle(bases, "relative_norm"), 2),
                formats.number(_middle(bases, "amplification"), 2),
                formats.exact(_sum(bases, "intruders")),
            )
        rows.append(row)
    if has_base:
        columns += ("of the base", "amplified", "intruders")
    return columns, rows


def _middle(rows: list[dict[str, Any]], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return median(known) if known else None


def _sum(rows: list[dict[str, Any]], key: str) -> int | None:
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) if known else None


def run_lines(run: Run) -> str:
    """A finished run in a few lines: figures, files, what to do next."""
    manifest = run.manifest
    best = f"; best at step {manifest['best']['step']}" if "best" in manifest else ""
    lines = [
        f"{run.config.method.kind}: {formats.count(manifest['trainable_parameters'])} of "
        f"{formats.count(manifest['total_parameters'])} parameters trained in "
        f"{manifest['steps_done']} steps{best}",
    ]
    for split in manifest["splits"]:
        shown = ", ".join(
            f"{name.replace('_', ' ')} {formats.number(figure['mean'], 4)} ({_range(figure)})"
            for name, figure in list(figures(run.metrics(split)["metrics"]).items())[:3]
        )
        lines += [f"{split}: {shown}"] if shown else []
    if "adapters" in manifest:
        lines += [
            f"{run.folder / name}  {formats.data_size(own['artifact_bytes'])}"
            for name, own in manifest["adapters"].items()
        ]
        then = f"loralab generate {run.folder} {shell_word(manifest['example'])} --image out.png"
    else:
        lines.append(f"{run.artifact}  {formats.data_size(manifest['artifact_bytes'])}")
        then = f'loralab evaluate {run.folder} --data ... or loralab generate {run.folder} "..."'
    lines += [f"{run.folder / 'report.html'}", f"Next: {then}"]
    return "\n".join(lines)


def shell_word(text: str) -> str:
    """The text as one word of a command line."""
    return quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def figures(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics that are one value with an interval."""
    return {
        name: figure
        for name, figure in metrics.items()
        if isinstance(figure, dict) and {"mean", "low", "high"} <= figure.keys()
    }


def _interval(figure: dict[str, float] | None, *, percent: bool = False) -> str:
    """A figure with its interval; the em dash for a method that diverged."""
    if figure is None:
        return formats.MISSING
    scale, digits, sign = (100, 1, " %") if percent else (1, 3, "")
    mean, low, high = (_scaled(figure[key], scale, digits) for key in ("mean", "low", "high"))
    return f"{mean}{sign} ({formats.span(low, high)})"


def _scaled(value: float | None, scale: int, digits: int) -> str:
    return formats.number(None if value is None else scale * value, digits)


def _range(figure: dict[str, float]) -> str:
    return formats.span(formats.number(figure["low"], 4), formats.number(figure["high"], 4))


def plan_tables(plan: dict[str, Any]) -> list[Table]:
    """The step over time, the peak's parts, the levers, and the methods where they were asked."""
    tables: list[Table] = [
        (
            ("stretch of the step", "highest"),
            [(point["moment"], formats.data_size(point["bytes"])) for point in plan["timeline"]],
        ),
        (
            (f"at the peak ({plan['phase']})", "bytes", "share"),
            [
                (kind, formats.data_size(held), formats.percent(held / plan["peak_bytes"]))
                for kind, held in plan["parts"].items()
            ],
        ),
        (
            ("lever", "saves", "cost"),
            [
                (lever["name"], formats.data_size(lever["saves_bytes"]), lever["cost"])
                for lever in plan["levers"]
            ],
        ),
    ]
    if "methods" in plan:
        tables.append(_methods_table(plan["methods"]))
    return [table for table in tables if table[1]]


def _methods_table(rows: list[dict[str, Any]]) -> Table:
    columns = ("method", "trained", "peak", "fits", "largest batch", "a step")
    return columns, [
        (
            row["method"],
            formats.count(row["trainable_parameters"]),
            formats.data_size(row["peak_bytes"]),
            "yes" if row["fits"] else "no",
            str(row["max_batch_size"]),
            formats.duration(row["seconds_per_step"]),
        )
        for row in rows
    ]


def plan_lines(plan: dict[str, Any]) -> str:
    """A plan's answer in a few lines."""
    fits = "fits" if plan["fits"] else "does not fit"
    lines = [
        f"{plan['model']}, {plan['method']}: {formats.data_size(plan['peak_bytes'])} "
        f"± {formats.percent(plan['error_bar'], 0)} at the peak; {fits} {plan['device']} "
        f"({formats.data_size(plan['usable_bytes'])} usable, "
        f"{formats.data_size(plan['context_bytes'])} of it for the context)",
        f"largest batch: {plan['max_batch_size']}",
        f"a step: {formats.count(plan['flops_per_step'])} operations, "
        f"{formats.duration(plan['seconds_per_step'])}",
    ]
    if "max_tokens" in plan:
        rank = f"; largest rank: {plan['max_rank']}" if "max_rank" in plan else ""
        lines.append(f"longest rows: {plan['max_tokens']} tokens{rank}")
    if "serving" in plan:
        lines.append(_serving_line(plan["serving"]))
    if "verification" in plan:
        check = plan["verification"]
        lines.append(
            f"checked on {check['device']}: predicted "
            f"{formats.data_size(check['predicted_bytes'])}, measured "
            f"{formats.data_size(check['measured_bytes'])} "
            f"({formats.points(check['error'])} %)"
        )
    return "\n".join(lines)


def _serving_line(serving: dict[str, Any]) -> str:
    return (
        f"serving {serving['num_adapters']} adapters: "
        f"{formats.data_size(serving['separate_bytes'])} beside one base, "
        f"{formats.data_size(serving['merged_bytes'])} merged; storage "
        f"{formats.data_size(serving['storage_adapters_bytes'])} instead of "
        f"{formats.data_size(serving['storage_models_bytes'])} "
        f"({formats.percent(serving['storage_saved_share'])} less)"
    )


def rank_table(document: dict[str, Any]) -> Table:
    """One row a candidate of either rule, and the whole adapter above them."""
    full = document["full"]
    unit = document["unit"].removeprefix("nats ")
    columns = ("rank", "rule", "size", "nll", f"lost nats {unit}", "at most (95 %)", "accuracy", "")
    head = (
        str(full["rank"]),
        "whole",
        formats.data_size(full["bytes"]),
        formats.number(full["nll"], 4),
        "",
        "",
        formats.percent(full["accuracy"]),
        "",
    )
    return columns, [head] + [
        (
            str(row["rank"]),
            row["rule"],
            formats.data_size(row["bytes"]),
            formats.number(row["nll"], 4),
            formats.number(row["lost_nll"]["mean"], 4),
            formats.number(row["lost_nll"]["upper"], 4),
            formats.percent(row["accuracy"]),
            "chosen" if row["chosen"] else "" if row["holds"] else "over the tolerance",
        )
        for row in document["curve"]
    ]


def trained_table(document: dict[str, Any]) -> Table:
    """One row a rank that was trained as well: its figures beside the truncation's."""
    columns = ("rank", "parameters", "size", "trained: nll", "accuracy", "truncated: nll")
    columns += ("accuracy", "trained minus truncated (95 %)")
    rows = []
    for row in document["trained"]:
        cut = row["truncated"] or {"nll": {"mean": None}, "accuracy": {"mean": None}}
        rows.append(
            (
                str(row["rank"]),
                formats.count(row["parameters"]),
                formats.data_size(row["bytes"]),
                formats.number(row["trained"]["nll"]["mean"], 4),
                formats.percent(row["trained"]["accuracy"]["mean"]),
                formats.number(cut["nll"]["mean"], 4),
                formats.percent(cut["accuracy"]["mean"]),
                _interval(row["difference"]) if row["difference"] else "",
            )
        )
    return columns, rows


def forgetting_table(document: dict[str, Any]) -> Table:
    """One row a setting of either dial: what it gains and what it forgets."""
    columns = ("dial", "setting", "gain (95 %)", "forgotten, nats a token (95 %)", "at most", "")
    return columns, [
        (
            point["dial"],
            f"{point['value']:g}",
            _interval(point["gain"]),
            _interval(point["forgotten"]),
            formats.number(point["forgotten"]["upper"], 4),
            "chosen" if point["chosen"] else "" if point["holds"] else "over the budget",
        )
        for point in document["points"]
    ]


def capacity_table(document: dict[str, Any]) -> Table:
    """One row a rank: numbers, and whether they could hold the data's bits, by targets."""
    choices = list(document["smallest"])
    columns = ("rank", *(name for choice in choices for name in (choice, "holds all bits")))
    rows = []
    for row in document["ranks"]:
        cells = [str(row["rank"])]
        for choice in choices:
            cells += [formats.count(row[choice]["parameters"])]
            cells += ["yes" if row[choice]["enough"] else "no"]
        rows.append(tuple(cells))
    return columns, rows
