"""Reading what may not be there: a value of a record that is missing, or cannot be meant, is None and never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]

COUNT, NUMBER, TEXT, FLAG = "Int64", "Float64", "string", "boolean"


def at(data: Any, *keys: str) -> Any:
    """The value under `keys`, or None where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def count(value: Any) -> int | None:
    """A count of bytes, blocks, …; booleans, fractions and numbers no counter can hold are absent."""
    usable = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return value if usable else None


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def text(value: Any) -> str | None:
    """Text that can be written as UTF-8: a lone surrogate becomes a question mark."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


READ: dict[str, Callable[[Any], Any]] = {COUNT: count, NUMBER: number, TEXT: text, FLAG: flag}


def pick(data: Any, columns: Mapping[str, tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    return {name: READ[kind](at(data, *path)) for name, (kind, path) in columns.items()}


def observations(record: Record, side: str) -> list[Mapping[str, Any]]:
    """What was observed from `side`: "inside" by the worker, "outside" by the host."""
    found = at(record, "inside") if side == "inside" else at(record, "host", "observations")
    return [seen for seen in found if isinstance(seen, Mapping)] if isinstance(found, list) else []
