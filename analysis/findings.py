"""A reason not to believe a result, and what such reasons are looked for in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

Severity = Literal["grave", "doubt", "note"]
SEVERITIES: tuple[Severity, ...] = ("grave", "doubt", "note")


@dataclass(frozen=True)
class Finding:
    severity: Severity
    sentence: str


@dataclass(frozen=True)
class Evidence:
    """Everything an audit looks at."""

    plan: Mapping[str, Any]
    trials: pd.DataFrame
    pairs: pd.DataFrame
    samples: Mapping[str, pd.DataFrame]  # by `<trial>-<attempt>`
    arms: tuple[str, ...]
    baseline: str
    against: str
    rivals: int  # unexpected differences between the compared arms' fingerprints
    twins: bool = False  # whether an arm equals the baseline in everything
    ended: bool = False  # whether the search needs no further block, though some may be left

    @functools.cached_property
    def counted(self) -> pd.DataFrame:
        """The attempts that count."""
        return self.trials[self.trials["standing"] == "counts"]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def names(values: pd.Series) -> str:
    found = [str(value) for value in values]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
