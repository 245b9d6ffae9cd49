"""What paired differences say, how surely, and whether anything but the arm could be speaking.

Pure functions of plain numbers. An interval needs two blocks; with fewer there is none, and it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from spark_ray import power

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """A mean paired difference with its t interval, and the rank statistics beside it. None: cannot be said."""

    n: int
    mean: float | None = None
    median: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    t: float | None = None
    p: float | None = None
    hodges_lehmann: float | None = None
    wilcoxon_p: float | None = None
    note: str = ""

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def as_dict(self) -> dict[str, float | int | str | None]:
        return asdict(self)


@dataclass(frozen=True)
class Effect:
    """A secondary effect (of order, of time): its size, and the probability of one as large by chance."""

    size: float
    p: float


def hodges_lehmann(values: Sequence[float]) -> float:
    """Median of the Walsh averages: the location estimate that belongs to Wilcoxon's signed-rank test."""
    array = np.asarray(values, dtype=float)
    first, second = np.triu_indices(len(array))
    return float(np.median(array[first] / 2 + array[second] / 2))


def paired(differences: Sequence[float]) -> Paired:
    """Summary of differences between arms, one per block."""
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n == 0:
        return Paired(0, note="no block has capacity in both arms")
    mean, median = float(values.mean()), float(np.median(values))
    if n == 1:
        return Paired(1, mean, median, hodges_lehmann=mean, note="no interval from one block")
    location = hodges_lehmann(differences)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():  # all equal: a t statistic would be 0/0 or infinite
        note = (
            f"0 of {n} blocks differ"
            if not values.any()
            else "all blocks agree exactly: the spread, and so the interval, is zero"
        )
        return Paired(n, mean, median, 0.0, mean, mean, hodges_lehmann=location, note=note)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    ranks = stats.wilcoxon(values, zero_method="zsplit")
    return Paired(
        n, mean, median, float(values.std(ddof=1)), float(interval.low), float(interval.high),
        float(test.statistic), float(test.pvalue), location, float(ranks.pvalue),
    )  # fmt: skip


def equivalence_p(differences: Sequence[float], margin: float) -> float | None:
    """Two one-sided t tests (TOST): small means that the mean lies within +-margin. None below two blocks.

    Raises:
        ValueError: the margin is not positive.
    """
    if margin <= 0:
        raise ValueError("an equivalence margin is positive")
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return 0.0 if abs(float(values.mean())) < margin else 1.0
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    return float(max(above, below))


def rank_equivalence_p(differences: Sequence[float], margin: float) -> float | None:
    """As `equivalence_p`, by two one-sided Wilcoxon signed-rank tests: for values with tails that swamp a mean.

    Raises:
        ValueError: the margin is not positive.
    """
    if margin <= 0:
        raise ValueError("an equivalence margin is positive")
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None
    above = stats.wilcoxon(values + margin, alternative="greater", zero_method="zsplit").pvalue
    below = stats.wilcoxon(values - margin, alternative="less", zero_method="zsplit").pvalue
    return float(max(above, below))


def order_effect(differences: Sequence[float], arm_was_first: Sequence[bool]) -> Effect | None:
    """How much larger the difference is where the arm ran before the baseline (Welch). None without two of each."""
    first = [value for value, was in zip(differences, arm_was_first, strict=True) if was]
    second = [value for value, was in zip(differences, arm_was_first, strict=True) if not was]
    if min(len(first), len(second)) < 2:
        return None
    effect = float(np.mean(first) - np.mean(second))
    if max(np.ptp(first), np.ptp(second)) == 0:  # capacity comes in whole blocks
        return Effect(effect, 0.0) if effect else None
    return Effect(effect, float(stats.ttest_ind(first, second, equal_var=False).pvalue))


def trend(differences: Sequence[float], times: Sequence[float]) -> Effect | None:
    """Change of the difference per block (least squares). None below three blocks or without spread."""
    if len(differences) < 3 or np.ptp(times) == 0 or np.ptp(differences) == 0:
        return None
    line = stats.linregress(times, differences)
    return Effect(float(line.slope), float(line.pvalue))


def autocorrelation(differences: Sequence[float]) -> float | None:
    """Lag-1 autocorrelation in the order of execution. None below four blocks or without spread."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 4 or np.ptp(values) == 0:
        return None
    centred = values - values.mean()
    square = float((centred**2).sum())
    return float((centred[1:] * centred[:-1]).sum()) / square if square > 0 else None


def effective_n(n: int, lag_1: float | None) -> float:
    """Blocks that independent ones would have to be: n (1 - r) / (1 + r), never more than n."""
    if lag_1 is None or lag_1 <= 0:
        return float(n)
    return max(1.0, n * (1 - lag_1) / (1 + lag_1))


def median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def detectable(sd: float | None, n: int) -> float | None:
    """Smallest mean difference that n more blocks of this spread would show, with the power and by the test of the plan."""
    return None if sd is None or sd == 0 else power.detectable(sd, n)
