"""Run settings: frozen, strictly loaded from one TOML file plus `section.key=value` overrides.

This module imports no torch. Every unknown key and bad value is reported at once, each unknown
key with the nearest known one.
"""

import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from loralab.errors import ConfigError, nearest

MethodKind = Literal["lora", "full", "frozen", "head"]
Task = Literal["classification", "causal"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Initialisation = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga"]


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression ({error})") from None
    return pattern


def _targets(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return _expression(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise ValueError('give "all-linear", a regular expression, or a list of names')


def _block_numbers(value: Any) -> Any:
    """`"0-3, 12"` -> `[0, 1, 2, 3, 12]`; a list stays as it is."""
    if not isinstance(value, str):
        return value
    numbers: list[int] = []
    for part in value.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if last < first:
            raise ValueError('give block numbers: a list, or ranges such as "0-3, 12-15"')
        numbers += range(first, last + 1)
    return numbers


Expression = Annotated[str, AfterValidator(_expression)]


class Section(BaseModel):
    """A table of settings: frozen, no unknown keys, no silent conversion of kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSection(Section):
    """Which base model, and what is put on top of it."""

    name: str
    task: Task = "classification"
    num_labels: Annotated[int, Field(ge=2)] = 2
    dtype: Dtype = "float32"
    head_bias: bool = False
    head_dropout: Fraction = 0.0
    dropout: Fraction | None = None  # the base's own dropouts; None keeps them
    pooling: Literal["native", "mean", "last"] = "native"


class DataSection(Section):
    """Which rows, from where, and which columns mean what.

    `name` is a catalogue name, a hub id or a local folder; `train`, `validation` and `test` are
    files (CSV, JSONL, Parquet), or the names of splits where `name` is a hub id.
    """

    name: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    train_rows: PositiveInt | None = None  # at most so many rows, chosen by hash
    validation_rows: PositiveInt | None = None
    test_rows: PositiveInt | None = None
    max_tokens: PositiveInt = 256
    min_rating: Annotated[float, Field(ge=0)] = 0.5  # rated texts with |rating| below are left out
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    group: str | None = None  # the column that names a row's document

    @model_validator(mode="after")
    def _has_a_source(self) -> "DataSection":
        if self.name is None and self.train is None:
            raise ValueError("give data.name (a catalogue name, hub id or folder) or data.train")
        return self


class MethodSection(Section):
    """How the model is fine-tuned. Each kind reads the keys that concern it.

    `rank_pattern` and `alpha_pattern` hold name endings or regular expressions of modules whose
    rank or alpha differs; the first that matches decides.
    """

    kind: MethodKind = "lora"
    rank: PositiveInt = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.0
    targets: Annotated[str | list[str], BeforeValidator(_targets)] = "all-linear"
    exclude: list[str] = []
    layers: Annotated[list[NonNegativeInt] | None, BeforeValidator(_block_numbers)] = None  # all
    rank_pattern: dict[Expression, PositiveInt] = {}
    alpha_pattern: dict[Expression, Positive] = {}
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    init: Initialisation = "kaiming"
    init_rows: PositiveInt = 64  # training rows that eva and lora_ga look at, chosen by hash
    redistribute_ranks: bool = True  # eva: ranks go where the inputs vary most
    loraplus_lr_ratio: Positive = 1.0  # LoRA+: B's learning rate over A's
    dora: bool = False
    biases: Literal["none", "targets", "all"] = "none"
    whole_modules: list[str] = []  # trained copies beside the adapter; the head is always one
    token_rows: dict[str, list[NonNegativeInt]] = {}  # embedding -> rows that train (new tokens)
    frozen_layers: NonNegativeInt | None = None  # None: the lower half
    freeze_embedding: bool = True


class TrainingSection(Section):
    """The optimisation: every number that decides the trained weights, and the device."""

    learning_rate: Positive = 2e-4
    head_learning_rate: Positive | None = None  # None: the same as learning_rate
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Fraction = 0.06  # share of all steps
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    fused: bool = True
    master_weights: bool = True  # fp32 copies of what is trained in a half-precision model
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # 0: no clipping
    activation_checkpointing: bool = False
    offload_activations: bool = False  # to pinned memory of the host, for long rows on a GPU
    fuse_blocks: bool = True  # blocks found by structure run as one autograd function
    compile: Literal["off", "on", "auto"] = "off"  # the other blocks; "auto" times both ways
    cache_frozen_prefix: bool = False  # frozen lower blocks run once a row, without dropout
    evaluations_per_epoch: PositiveInt = 1
    patience: PositiveInt | None = None  # stop after so many validations without improvement
    checkpoint_steps: PositiveInt = 50
    evaluation_batch_size: PositiveInt = 64
    device: str = "auto"
    memory_plan: Literal["stop", "warn", "off"] = "stop"  # where the plan says it will not fit
    threads: PositiveInt | None = None
    sinks: list[Literal["tensorboard", "wandb"]] = []


class CompareSection(Section):
    """The contest: which methods, which learning rates each, how many seeds at the best one."""

    methods: list[MethodKind] = ["head", "lora", "frozen", "full"]
    learning_rates: dict[MethodKind, list[Positive]] = {}
    max_extensions: Annotated[int, Field(ge=0)] = 2
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3)] = [0, 1, 2]
    storage_tasks: PositiveInt = 10  # N in the storage sum: N models against one base, N adapters
    measured_steps: PositiveInt = 5
    stop_losers: bool = False  # successive halving of LoRA's sweep: the worse half stops early

    @model_validator(mode="after")
    def _no_repeats(self) -> "CompareSection":
        if len(set(self.methods)) < len(self.methods) or len(self.methods) < 2:
            raise ValueError("compare.methods needs at least two different methods")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("compare.seeds holds a seed twice")
        return self


class RunConfig(Section):
    """All settings of a run or a comparison."""

    model: ModelSection
    data: DataSection
    method: MethodSection = MethodSection()
    training: TrainingSection = TrainingSection()
    compare: CompareSection = CompareSection()

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with `section__key=value` changed, checked like a fresh one."""
        tables = self.model_dump()
        for dotted, value in changes.items():
            section, key = dotted.split("__", 1)
            tables[section][key] = value
        return parse_config(tables)

    def to_toml(self) -> str:
        """The complete settings as TOML text (keys without a value are left out)."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type)
}


def parse_config(tables: dict[str, Any], source: str = "the settings") -> RunConfig:
    """Tables of settings -> `RunConfig`.

    Raises `ConfigError` that lists every unknown key (with the nearest one) and every bad value.
    """
    try:
        return RunConfig.model_validate(tables)
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors()]
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(
            f"{source}: {len(faults)} fault{'s' if len(faults) > 1 else ''}\n{listed}",
            "mend them all and start again; `loralab init` writes a commented recipe.",
        ) from None


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe (a TOML file, or the name of a shipped one) with `section.key=value` overrides.

    Raises `ConfigError` for a recipe that is not found or is no TOML, and as `parse_config` does.
    """
    return _overridden(read_recipe(recipe), overrides, source=str(recipe))


def config_without_rows(overrides: Sequence[str]) -> RunConfig:
    """Settings made of overrides alone, for what reads no rows: a plan. As `load_config`."""
    return _overridden({"data": {"name": "no rows are read"}}, overrides, source="the settings")


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Settings with `section.key=value` changed. Raises `ConfigError` as `parse_config` does."""
    return _overridden(config.model_dump(exclude_none=True), overrides, source="the settings")


def _overridden(tables: dict[str, Any], overrides: Sequence[str], source: str) -> RunConfig:
    for override in overrides:
        _apply(tables, override)
    return parse_config(tables, source=source)


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The tables of a recipe file or of a shipped recipe named without path and suffix."""
    path = Path(recipe)
    shipped = resources.files("loralab") / "recipes" / f"{recipe}.toml"
    if path.is_file():
        data = path.read_bytes()
    elif path.name == str(recipe) and shipped.is_file():
        data = shipped.read_bytes()
    else:
        names = ", ".join(shipped_recipes())
        raise ConfigError(
            f"no recipe {str(recipe)!r}: neither a file nor a shipped recipe ({names})",
            "give the path of a TOML file, or write one with `loralab init`.",
        )
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{recipe}: not UTF-8 text ({error})", "save the file as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe}: not valid TOML: {error}", "mend that line.") from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that travel inside the package."""
    folder = resources.files("loralab") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_OVERRIDE = re.compile(rf"\s*({_PART}(?:\s*\.\s*{_PART})+)\s*=(.*)", re.DOTALL)


def _apply(tables: dict[str, Any], override: str) -> None:
    found = _OVERRIDE.fullmatch(override)
    if found is None:
        raise ConfigError(
            f"override {override!r} is not of the form section.key=value",
            "write for example method.rank=8, training.learning_rate=1e-3 or"
            " method.rank_pattern.q_proj=4; quote a key that holds dots.",
        )
    text = found[2]
    *parents, key = _key_parts(found[1])
    place = tables
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is no table", "check the key.")
    place[key] = _toml_value(text.strip())


def _key_parts(dotted: str) -> list[str]:
    """The parts of a dotted TOML key, which may be quoted."""
    try:
        return [next(iter(tomllib.loads(f"{part} = 0"))) for part in re.findall(_PART, dotted)]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"override key {dotted!r}: {error}",
            "put a regular expression into single quotes, where a backslash is a backslash.",
        ) from None


def _toml_value(text: str) -> Any:
    """A value as TOML reads it; words that are no TOML value are strings."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"] if part != "[key]")
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        known = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        return f"{place}: unknown value {fault['input']!r}; {nearest(fault['input'], known)}"
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place}; {nearest(str(fault['loc'][-1]), _siblings(fault['loc']))}"
    if fault["type"] == "missing":
        return f"{place} is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    given = fault["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"{place}: {message[:1].lower()}{message[1:]}{shown}"


def _siblings(loc: tuple[Any, ...]) -> list[str]:
    if len(loc) == 1:
        return list(SECTIONS)
    section = SECTIONS.get(str(loc[0]))
    return list(section.model_fields) if section else []
