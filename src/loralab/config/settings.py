"""All settings of a run: read from one TOML file plus `section.key=value` overrides.

Every unknown key and bad value is reported at once, each unknown key with the nearest known one.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, model_validator

from loralab.config.sections import (
    TEXT_ONLY,
    CompareSection,
    DataSection,
    ImagesSection,
    MethodSection,
    ModelSection,
    Section,
    TrainingSection,
)
from loralab.errors import ConfigError, nearest


class RunConfig(Section):
    """All settings of a run or a comparison."""

    model: ModelSection
    data: DataSection
    method: MethodSection = MethodSection()
    training: TrainingSection = TrainingSection()
    images: ImagesSection = ImagesSection()
    compare: CompareSection = CompareSection()

    @model_validator(mode="after")
    def _fits_the_task(self) -> "RunConfig":
        if self.model.task == "image":
            faults, whose = _changed(self, TEXT_ONLY), "a language model's"
        else:
            faults = _changed(self, {"images": tuple(ImagesSection.model_fields)})
            whose = "an image model's"
        if faults:
            raise ValueError(f"{', '.join(faults)}: {whose}, and model.task is {self.model.task!r}")
        return self

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with `section__key=value` changed, checked like a fresh one."""
        tables = self.model_dump()
        for dotted, value in changes.items():
            section, key = dotted.split("__", 1)
            tables[section][key] = value
        return parse_config(tables)

    def to_toml(self) -> str:
        """The complete settings as TOML text (keys without a value are left out)."""
        return tomli_w.dumps(self.tables())

    def tables(self) -> dict[str, dict[str, Any]]:
        """The settings that have a value, by section; those of the task alone."""
        left_out = {"compare"} if self.model.task == "image" else {"images"}
        return self.model_dump(exclude_none=True, exclude=left_out)


def toml_value(value: object) -> str:
    """A value as an override is written: `section.key=` this."""
    return tomli_w.dumps({"value": value}, multiline_strings=False).partition("= ")[2].strip()


def _changed(config: RunConfig, keys: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of the keys that have another value than the one that goes without saying."""
    return [
        f"{section}.{key}"
        for section, names in keys.items()
        for key in names
        if getattr(own := getattr(config, section), key) != type(own).model_fields[key].default
    ]


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
    shipped = _shipped(str(recipe))
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


def shipped_text(name: str) -> str:
    """A recipe that travels inside the package, with its comments."""
    return _shipped(name).read_text(encoding="utf-8")


def _shipped(name: str) -> Traversable:
    return resources.files("loralab") / "recipes" / f"{name}.toml"


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
    said = f"{message[:1].lower()}{message[1:]}{shown}"
    return f"{place}: {said}" if place else said


def _siblings(loc: tuple[Any, ...]) -> list[str]:
    if len(loc) == 1:
        return list(SECTIONS)
    section = SECTIONS.get(str(loc[0]))
    return list(section.model_fields) if section else []
