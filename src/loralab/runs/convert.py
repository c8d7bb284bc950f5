"""Another rank, scaling, initialisation or alpha that starts the same training.

What Adam sees of a setting are two numbers (`lowrank.scaling`): the size of the first update,
`rank * scale * std(A) * rate of B`, and the steps that pass before A moves, `std(A) / rate of A`.
A conversion keeps both.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from loralab.adapters import adapter_parameters, attach
from loralab.config import MethodSection, RunConfig
from loralab.errors import ConfigError, nearest
from loralab.lowrank import Number, Setting, alpha_of, equivalent, initial_std
from loralab.models import head_name
from loralab.planning import meta_model
from loralab.training import ADAPTER_NAME, lora_config, summarise

CHANGES = ("rank", "scaling", "init", "alpha")
SMALLEST_EPSILON = 1e-15  # above it, Adam's epsilon tells the sizes of gradients apart


@dataclass(frozen=True)
class Conversion:
    """A converted recipe: its settings, what was overridden for it, and the evidence.

    before, after: of the median module (`training.EffectiveStep`).
    first_update_ratio: after over before, the lowest and the highest of a module.
    notes: under which conditions, and how far, the two trainings are the same.
    """

    config: RunConfig
    overrides: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]
    first_update_ratio: tuple[float, float]
    notes: tuple[str, ...]

    def arguments(self) -> list[str]:
        """The overrides as `section.key=value`, for the command line."""
        return [f"{key}={_as_toml(value)}" for key, value in self.overrides.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = asdict(self)
        del told["config"]
        return {**told, "arguments": self.arguments()}


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """`["rank=64", "scaling=alpha/sqrt(rank)"]` -> a mapping for `convert`."""
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"--convert {text!r} is not of the form key=value", "write for example rank=64."
            )
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value.strip()
    return changes


def convert(config: RunConfig, changes: Mapping[str, Any]) -> Conversion:
    """The recipe with `changes` (of rank, scaling, init, alpha) that starts the same training.

    Alpha takes up a changed rank or scaling; a changed alpha is taken up by B's learning rate
    (`loraplus_lr_ratio`), a changed std of A by A's (`learning_rate`; the head's is kept). The
    model is built from its configuration, without weights.

    Raises `ConfigError` for a change that is unknown or a bad value, or a recipe that trains no
    adapter; `AdapterError` for initialisations whose B does not start at zero.
    """
    config.model.check_reads_text()
    old = config.method
    _check(old, changes)
    asked = config.replace(**{f"method__{key}": value for key, value in changes.items()}).method
    columns = _input_sizes(config)
    middle = round(median(columns.values()))
    rates = config.training.learning_rate, config.training.learning_rate * old.loraplus_lr_ratio
    before = _setting(old, old.rank, old.alpha, middle, rates)
    after = equivalent(
        before,
        rank=asked.rank,
        scaling=asked.scaling,
        std=initial_std(asked.init, asked.rank, middle),
        alpha=asked.alpha if "alpha" in changes else None,
    )
    overrides = {f"method.{key}": getattr(asked, key) for key in changes}
    overrides |= _consequences(config, asked, before, after, middle)
    made = config.replace(**{key.replace(".", "__"): v for key, v in overrides.items()})
    pairs = _by_module(config, columns), _by_module(made, columns)
    ratios = [pairs[1][module].first_update / pairs[0][module].first_update for module in columns]
    return Conversion(
        config=made,
        overrides=overrides,
        before=summarise(list(pairs[0].values())).to_dict(),
        after=summarise(list(pairs[1].values())).to_dict(),
        first_update_ratio=(min(ratios), max(ratios)),
        notes=tuple(_notes(config, made, ratios)),
    )


def _check(method: MethodSection, changes: Mapping[str, Any]) -> None:
    if method.kind != "lora":
        raise ConfigError(
            f"method.kind is {method.kind!r}, which has neither rank nor alpha to convert",
            "set method.kind to 'lora'.",
        )
    unknown = [f"{key!r} ({nearest(key, CHANGES)})" for key in changes if key not in CHANGES]
    if unknown or not changes:
        raise ConfigError(
            f"no conversion is known for {', '.join(unknown) or 'nothing'}",
            f"change one or more of {', '.join(CHANGES)}.",
        )


def _input_sizes(config: RunConfig) -> dict[str, int]:
    """The number of inputs of every module that the recipe adapts, by its name."""
    twin = meta_model(config)
    head = head_name(twin) if config.model.task == "classification" else None
    attach(twin, lora_config(config.method, head), ADAPTER_NAME)
    ending = f".adapters.{ADAPTER_NAME}.A"
    found = {
        name.removesuffix(ending): parameter.shape[1]
        for name, parameter in adapter_parameters(twin, ADAPTER_NAME).items()
        if name.endswith(ending)
    }
    if not found:
        raise ConfigError("the recipe adapts no module", "set method.targets.")
    return found


def _setting(
    method: MethodSection, rank: int, alpha: float, columns: int, rates: tuple[float, float]
) -> Setting:
    std = initial_std(method.init, rank, columns)
    return Setting(rank, alpha, method.scaling, std, rates[0], rates[1])


def _consequences(
    config: RunConfig, asked: MethodSection, before: Setting, after: Setting, columns: int
) -> dict[str, Any]:
    """What must be set beside what was asked for, so that training starts the same."""
    old, training = config.method, config.training
    found: dict[str, Any] = {}
    if not _same(after.alpha, asked.alpha):
        found["method.alpha"] = _rounded(after.alpha)
    patterns = {
        key: _alpha_of_pattern(key, old, asked, before, after, columns)
        for key in {**old.rank_pattern, **old.alpha_pattern}
    }
    left_alone = {key: old.alpha_pattern.get(key, after.alpha) for key in patterns}
    if not all(_same(alpha, left_alone[key]) for key, alpha in patterns.items()):
        found["method.alpha_pattern"] = {key: _rounded(alpha) for key, alpha in patterns.items()}
    if not _same(after.learning_rate_A, before.learning_rate_A):
        found["training.learning_rate"] = _rounded(after.learning_rate_A)
        if training.head_learning_rate is None and config.model.task == "classification":
            found["training.head_learning_rate"] = training.learning_rate
    ratio = after.learning_rate_B / after.learning_rate_A
    if not _same(ratio, old.loraplus_lr_ratio):
        found["method.loraplus_lr_ratio"] = _rounded(ratio)
    return found


def _alpha_of_pattern(
    key: str,
    old: MethodSection,
    asked: MethodSection,
    before: Setting,
    after: Setting,
    columns: int,
) -> float:
    """The alpha that keeps the first update of the modules that a pattern matches."""
    rates = before.learning_rate_A, before.learning_rate_B
    rank, alpha = old.rank_pattern.get(key, old.rank), old.alpha_pattern.get(key, old.alpha)
    update = _setting(old, rank, alpha, columns, rates).first_update
    rank = asked.rank_pattern.get(key, asked.rank)
    std = initial_std(asked.init, rank, columns)
    return alpha_of(update / (rank * std * after.learning_rate_B), rank, asked.scaling)


def _by_module(config: RunConfig, columns: Mapping[str, int]) -> dict[str, Setting]:
    adapter, method, rate = lora_config(config.method, None), config.method, config.training
    rates = rate.learning_rate, rate.learning_rate * method.loraplus_lr_ratio
    return {
        module: _setting(method, adapter.rank_at(module), adapter.alpha_at(module), size, rates)
        for module, size in columns.items()
    }


def _notes(old: RunConfig, new: RunConfig, ratios: Sequence[float]) -> list[str]:
    before, after, training = old.method, new.method, new.training
    notes = []
    same_rates = (old.training.learning_rate, before.loraplus_lr_ratio) == (
        training.learning_rate,
        after.loraplus_lr_ratio,
    )
    conditions = [
        f"{key} = {wanted}"
        for key, wanted, holds in (
            ("training.weight_decay", "0", training.weight_decay == 0),
            ("training.max_grad_norm", "0", training.max_grad_norm == 0),
            ("training.epsilon", "1e-30", training.epsilon <= SMALLEST_EPSILON),
        )
        if not holds
    ]
    if after.rank != before.rank:
        notes.append("at another rank the first update is the same in expectation")
    elif after.init != before.init:
        notes.append("another initialisation draws other numbers: the same in size, not in bits")
    elif same_rates or not conditions:
        notes.append("the two trainings are the same, step by step")
    else:
        notes.append(f"step by step the same only with {', '.join(conditions)}")
    if max(ratios) > 1.01 or min(ratios) < 0.99:
        notes.append(
            f"single modules' first updates are {min(ratios):.3g} to {max(ratios):.3g} times what "
            "they were: their input sizes differ, and one alpha serves all"
        )
    others = before.dora or before.biases != "none" or before.whole_modules or before.token_rows
    if training.learning_rate != old.training.learning_rate and others:
        notes.append(
            "training.learning_rate changes for biases, magnitudes, token rows and whole modules "
            "as well"
        )
    if after.init == "eva" and after.redistribute_ranks and not after.rank_pattern:
        notes.append("eva moves ranks between modules; these figures are those of equal ranks")
    return notes


def _same(one: Number, other: Number) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)


def _rounded(value: float) -> float:
    """Twelve digits: enough for the same training, short enough to be read."""
    return float(f"{value:.12g}")


def _as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_as_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)
