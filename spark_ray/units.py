"""Sizes and durations as people write them, and back."""

from __future__ import annotations

import math
import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_SIZE_UNITS = {
    "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024**4,
    "kB": 1000, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
}  # fmt: skip
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


def _parse(text: object, units: dict[str, float] | dict[str, int], kind: str, example: str) -> float:
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a {kind}: write a number with its unit, such as {example}")
    if match[2] not in units:
        close = [unit for unit in units if unit.lower().startswith(match[2].lower())]
        hint = f"did you mean {match[1]}{close[0]}?" if close else f"use one of {', '.join(units)}"
        raise ValueError(f"{text!r} is not a {kind}: {match[2]} is not a unit; {hint}")
    value = float(match[1]) * units[match[2]]
    if not math.isfinite(value):
        raise ValueError(f"{match[1][:12]}… is not a {kind}: the number is too large")
    return value


def parse_size_bytes(text: object) -> int:
    """Bytes of "2GiB", "512 MiB", "1.5GB". A bare number is refused: its unit would be a guess.

    >>> parse_size_bytes("1.5 GiB")
    1610612736
    """
    return round(_parse(text, _SIZE_UNITS, "size", "2GiB"))


def parse_rate_bytes_per_s(text: object) -> float:
    """Bytes per second of "273GB/s".

    >>> parse_rate_bytes_per_s("273GB/s")
    273000000000.0
    """
    size, slash, second = text.partition("/") if isinstance(text, str) else ("", "", "")
    if not slash or second.strip() != "s":
        raise ValueError(f"{text!r} is not a rate: write a size per second, such as 273GB/s")
    return float(parse_size_bytes(size))


def parse_duration_s(text: object) -> float:
    """Seconds of "90s", "5min", "250ms", "2h".

    >>> parse_duration_s("5min")
    300.0
    """
    return _parse(text, _DURATION_UNITS, "duration", "90s")


def format_bytes(value: float) -> str:
    """A size for people, binary units.

    >>> format_bytes(1610612736)
    '1.50 GiB'
    """
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """A duration for people.

    >>> format_duration(125)
    '2 min 05 s'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
