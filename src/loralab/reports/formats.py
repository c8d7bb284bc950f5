"""Numbers as people read them: 1.24 B parameters, 20.57 GiB, 412 ms, 93.8 %.

Every function returns the em dash for a figure that is missing or not finite, so that a page can
show a method whose run diverged.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "—"
_MINUS = "\N{MINUS SIGN}"


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, decimals: int, *, signed: bool = False) -> str:
    """A fixed number of decimals, a true minus sign; `signed` shows the plus too."""
    figure = finite(value)
    if figure is None:
        return MISSING
    text = f"{figure:{'+' if signed else ''},.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def percent(share: Any, decimals: int = 1) -> str:
    """A share of 1 as per cent."""
    figure = finite(share)
    return MISSING if figure is None else f"{number(100 * figure, decimals)}\N{NO-BREAK SPACE}%"


def points(difference: Any, decimals: int = 2) -> str:
    """A difference of two shares in percentage points, signed."""
    figure = finite(difference)
    return MISSING if figure is None else number(100 * figure, decimals, signed=True)


def span(low: str, high: str) -> str:
    """Two formatted ends as one interval; signed ends are joined by a word."""
    if MISSING in (low, high):
        return MISSING
    signed = any(end.startswith((_MINUS, "+")) for end in (low, high))
    return f"{low}{' to ' if signed else '–'}{high}"


def count(value: Any) -> str:
    """Three significant digits with k, M, B or T: 1.24 B."""
    figure = finite(value)
    if figure is None:
        return MISSING
    if abs(figure) < 1000:
        return number(figure, 0 if figure == int(figure) else 1)
    for exponent, suffix in ((3, "k"), (6, "M"), (9, "B"), (12, "T")):
        scaled = figure / 10**exponent
        if abs(scaled) < 999.5 or suffix == "T":
            return f"{_three_digits(scaled)}\N{NO-BREAK SPACE}{suffix}"
    raise AssertionError("unreachable: the last suffix takes every figure")


def exact(value: Any) -> str:
    """A whole number with separators: 1,235,818,498."""
    return number(value, 0)


def data_size(num_bytes: Any) -> str:
    """Binary units (1 GiB = 2^30 bytes): 20.57 GiB, 43.1 MiB, 512 B."""
    figure = finite(num_bytes)
    if figure is None:
        return MISSING
    for exponent, unit, decimals in ((30, "GiB", 2), (20, "MiB", 1), (10, "KiB", 1)):
        if abs(figure) >= 2**exponent:
            return f"{number(figure / 2**exponent, decimals)}\N{NO-BREAK SPACE}{unit}"
    return f"{number(figure, 0)}\N{NO-BREAK SPACE}B"


def duration(seconds: Any) -> str:
    """412 ms, 3.21 s, 7 min 21 s, 2 h 05 min."""
    figure = finite(seconds)
    if figure is None:
        return MISSING
    if figure < 0.9995:
        return f"{_three_digits(1000 * figure)}\N{NO-BREAK SPACE}ms"
    if figure < 59.95:
        return f"{_three_digits(figure)}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(figure), 60)
    if minutes < 60:
        return f"{minutes}\N{NO-BREAK SPACE}min {rest:02d}\N{NO-BREAK SPACE}s"
    return f"{minutes // 60}\N{NO-BREAK SPACE}h {minutes % 60:02d}\N{NO-BREAK SPACE}min"


def rate(value: Any) -> str:
    """A learning rate as it is written in a recipe: 2e-4."""
    figure = finite(value)
    if figure is None:
        return MISSING
    mantissa, exponent = f"{figure:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def p_value(value: Any) -> str:
    """Three decimals, and `< 0.001` below."""
    figure = finite(value)
    if figure is None:
        return MISSING
    return "<\N{THIN SPACE}0.001" if figure < 0.001 else f"{figure:.3f}"


def words(key: str) -> str:
    """A key as words: `train_rows` -> `train rows`; some keys have a better name."""
    return _NAMES.get(key) or key.replace("_", " ")


_NAMES = {
    "nll": "neg. log-likelihood",
    "macro_f1": "macro F1",
    "f1": "F1",
    "validation_nll": "validation loss",
    "step_seconds": "a step",
    "total_seconds": "training time",
    "peak_bytes": "peak memory",
    "artifact_bytes": "on disk",
    "base_bytes": "base model",
    "total_bytes": "in total",
}


def plain(value: Any, key: str = "") -> str:
    """Any value of plain data as one line of text; units by the end of its key."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if key.endswith("bytes"):
        return data_size(value)
    if key.endswith("seconds"):
        return duration(value)
    if isinstance(value, int):
        return exact(value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else MISSING
    if isinstance(value, Sequence) and all(_is_scalar(item) for item in value):
        return ", ".join(plain(item) for item in value) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def flatten(
    tables: Mapping[str, Any], prefix: str = "", separator: str = "."
) -> list[tuple[str, Any]]:
    """Nested mappings as (joined keys, value) rows, in their order."""
    rows: list[tuple[str, Any]] = []
    for key, value in tables.items():
        joined = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows.extend(flatten(value, f"{joined}{separator}", separator))
        else:
            rows.append((joined, value))
    return rows


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _three_digits(figure: float) -> str:
    size = abs(figure)
    return number(figure, 2 if size < 9.995 else 1 if size < 99.95 else 0)
