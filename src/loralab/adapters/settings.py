"""What an adapter is made of: one frozen value, checked as a whole when it is made."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loralab.errors import ConfigError, nearest
from loralab.lowrank import INITIALISERS, SCALINGS, ScalingName, scale_of

DATA_DRIVEN = ("eva", "lora_ga")


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of one adapter. Raises `ConfigError` that lists every fault.

    targets: "all-linear", a regular expression that must match a module's whole name, or a
        sequence of suffixes (`"q_proj"` matches `model.layers.0.self_attn.q_proj`).
    exclude: modules that are left out although a target matches them, said as in `targets`.
    layers: the numbers of the repeated blocks that get the adapter; None means all.
    rank_pattern, alpha_pattern: suffix or regular expression of module names -> rank or alpha,
        where it differs from `rank` and `alpha`; the first that matches decides.
    whole_modules: suffixes of modules of which the adapter trains its own copy (heads, norms).
    token_rows: suffix of an embedding -> the rows of it that the adapter trains (new tokens).
    biases: "targets" trains the biases of the adapted modules too, "all" those of every module.
    dora: trains each output's magnitude apart from its direction (Liu et al. 2024, 2402.09353).
    """

    rank: int = 16
    alpha: float | int = 32.0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    dropout: float | int = 0.0
    scaling: ScalingName = "alpha/rank"
    init: str = "kaiming"
    whole_modules: Sequence[str] = ()
    layers: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float | int] = field(default_factory=dict)
    token_rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    biases: str = "none"
    dora: bool = False

    def __post_init__(self) -> None:
        self._freeze("whole_modules", _strings(self.whole_modules))
        for name in ("targets", "exclude"):
            if not isinstance(getattr(self, name), str):
                self._freeze(name, tuple(getattr(self, name)))
        if self.layers is not None:
            self._freeze("layers", tuple(self.layers))
        for name in ("rank_pattern", "alpha_pattern"):
            self._freeze(name, dict(getattr(self, name)))
        rows = {module: tuple(indices) for module, indices in self.token_rows.items()}
        self._freeze("token_rows", rows)
        faults = list(_faults(self))
        if faults:
            raise ConfigError(
                "adapter settings: " + "; ".join(faults), "mend them all and attach again."
            )
        self._freeze("_ranks", _Patterns(self.rank_pattern))
        self._freeze("_alphas", _Patterns(self.alpha_pattern))

    _ranks: ClassVar["_Patterns"]  # of an instance, but no field of it
    _alphas: ClassVar["_Patterns"]

    def rank_at(self, module: str, default: int | None = None) -> int:
        """The rank at the module of that full name; where no pattern names it, the default."""
        return self._ranks.find(module, self.rank if default is None else default)

    def alpha_at(self, module: str, default: float | int | None = None) -> float | int:
        """The alpha at the module of that full name; where no pattern names it, the default."""
        return self._alphas.find(module, self.alpha if default is None else default)

    def scale_at(self, module: str, rank: int) -> float:
        """The factor before `B @ A` at the module of that full name, whose pair has that rank."""
        return scale_of(self.alpha_at(module), rank, self.scaling)

    def _freeze(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash((self.rank, self.alpha, self.targets, self.scaling, self.init))


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


class _Patterns:
    """Values by patterns of names: the first that matches a name or a suffix of it (PEFT's rule).

    Patterns that are one name, anchored, are looked up; there may be one for each module.
    """

    def __init__(self, pattern: Mapping[str, Any]) -> None:
        self._exact: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        for position, (key, value) in enumerate(pattern.items()):
            name = key[1:].replace(r"\.", ".")
            if key == "^" + name.replace(".", r"\.") and re.fullmatch(r"[\w.-]+", name):
                self._exact.setdefault(name, (position, value))
            else:
                expression = re.compile(rf"(.*\.)?({key})")
                self._expressions.append((position, expression, value))

    def find(self, name: str, default: Any) -> Any:
        """The value of the first pattern that matches."""
        last, found = self._exact.get(name, (len(self._expressions) + len(self._exact), default))
        for position, expression, value in self._expressions:
            if position > last:
                break
            if expression.fullmatch(name):
                return value
        return found


def _faults(config: LoRAConfig) -> list[str]:
    faults = []
    ranks = {"rank": config.rank, **config.rank_pattern}
    faults += [
        f"{name} is {rank!r}, not a whole number above 0"
        for name, rank in ranks.items()
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1
    ]
    alphas = {"alpha": config.alpha, **config.alpha_pattern}
    faults += [
        f"{name} is {alpha!r}, not a finite number above 0"
        for name, alpha in alphas.items()
        if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0
    ]
    if not isinstance(config.dropout, int | float) or not 0 <= config.dropout < 1:
        faults.append(f"dropout is {config.dropout!r}, not in [0, 1)")
    if config.scaling not in SCALINGS:
        faults.append(f"unknown scaling {config.scaling!r}; {nearest(config.scaling, SCALINGS)}")
    known = (*INITIALISERS, *DATA_DRIVEN)
    if config.init not in known:
        faults.append(f"unknown init {config.init!r}; {nearest(config.init, known)}")
    if config.biases not in ("none", "targets", "all"):
        faults.append(f"biases is {config.biases!r}; known: none, targets, all")
    if not config.targets and not config.whole_modules and not config.token_rows:
        faults.append("neither targets nor whole_modules nor token_rows: nothing to train")
    patterns = [*config.rank_pattern, *config.alpha_pattern]
    patterns += [said for said in (config.targets, config.exclude) if isinstance(said, str)]
    return faults + [fault for pattern in patterns if (fault := _bad_expression(pattern))]


def _bad_expression(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is no regular expression ({error})"
    return None
