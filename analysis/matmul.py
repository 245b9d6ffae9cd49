"""The matrix product by arm: how long it took, on which device, and how many times as long as in the baseline's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import statistics
from .findings import Evidence, Finding
from .reading import NUMBER, TEXT, Record, at, number, text

_LARGEST = 700.0  # whose exponential is still a number
COLUMNS = {"matmul_median_s": NUMBER, "matmul_device": TEXT}
MEANINGS = {
    "matmul_median_s": "median duration of the matrix product, in seconds",
    "matmul_device": "what multiplied: cpu or the GPU's name",
}


@dataclass(frozen=True)
class Ratio:
    """`p`: of the t test that it is 1. None: cannot be said."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Row:
    """One arm. `ratio`: its duration by the baseline's, the geometric mean over the blocks that have both; None for the baseline."""

    arm: str
    trials: int
    devices: tuple[str, ...]
    median_s: float | None
    median_flop_per_s: float | None
    ratio: Ratio | None

    @property
    def words(self) -> str:
        """The ratio in a sentence's end."""
        found = self.ratio
        if found is None or found.mean is None:
            return "–"
        interval = f" (95 % {found.low:.4g} … {found.high:.4g})" if found.low is not None else ""
        return f"{found.mean:.4g}{interval}, {found.n} block{'' if found.n == 1 else 's'}"

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "devices": list(self.devices), "ratio": self.ratio and vars(self.ratio)}


def of_record(record: Record) -> dict[str, Any]:
    """The columns above; absent where no product was asked for."""
    found = at(record, "result", "measurements", "matmul")
    durations = at(found, "durations_s")
    found_s = map(number, durations if isinstance(durations, list) else ())
    known = [each for each in found_s if each is not None and each > 0]
    return {"matmul_median_s": statistics.median(known), "matmul_device": text(at(found, "device"))}


def rows(counted: pd.DataFrame, arms: tuple[str, ...], baseline: str) -> tuple[Row, ...]:
    """One row per arm over the attempts that count, whatever became of the pool; none where nothing was multiplied."""
    timed = counted[counted["matmul_median_s"].notna()]
    by_arm = {arm: timed[timed["arm"] == arm].set_index("block_id") for arm in arms}
    return tuple(_row(arm, by_arm, baseline) for arm in arms if len(timed))


def _ratio(mine: pd.Series, base: pd.Series) -> Ratio:
    """By logarithms: twice as long and half as long are as far from equal, and no interval reaches below 0."""
    found = statistics.paired([float(v) for v in (mine.map(math.log) - base.map(math.log)).dropna()])
    mean, low, high = (
        None if v is None else math.exp(min(v, _LARGEST)) for v in (found.mean, found.low, found.high)
    )
    return Ratio(found.n, mean, low, high, found.p)


def _row(arm: str, by_arm: dict[str, pd.DataFrame], baseline: str) -> Row:
    mine, base = by_arm[arm], by_arm.get(baseline)
    ratio = None
    if arm != baseline and base is not None:
        ratio = _ratio(mine["matmul_median_s"], base["matmul_median_s"])
    return Row(
        arm=arm,
        trials=len(mine),
        devices=tuple(sorted(mine["matmul_device"].dropna().unique())),
        median_s=statistics.median([float(v) for v in mine["matmul_median_s"]]),
        median_flop_per_s=statistics.median([float(v) for v in mine["matmul_flop_per_s"].dropna()]),
        ratio=ratio,
    )


def doubts(seen: Evidence) -> Iterator[Finding]:
    """A product on a GPU is not to be compared with one on a CPU."""
    found = rows(seen.counted, seen.arms, seen.baseline)
    if len({each.devices for each in found if each.trials}) > 1:
        said = "; ".join(f"{each.arm}: {', '.join(each.devices)}" for each in found if each.trials)
        yield Finding("grave", f"The matrix product was not made on the same device in all arms ({said}).")
