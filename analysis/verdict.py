"""The answer in plain words, first what must be known before the rest is read."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from spark_ray.units import format_bytes

from . import attribution, noise, statistics
from .attribution import PAGE_CACHE, TERMS, Attribution

_EXPLAINED = 0.25  # a cause is named as the cause when it leaves at most this share of the difference open
MARGIN = 0.02
"""Arms whose mean contrast lies surely within this are called equivalent. A convention, fixed before any data."""


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline, over the blocks in which both have a capacity."""

    arm: str
    baseline: str
    contrast: statistics.Paired  # 1 - KV(arm) / KV(baseline)
    equivalence_p: float | None
    baseline_bytes: float | None  # mean KV capacity of the baseline
    delta_bytes: float | None  # mean
    predicted_bytes: float | None  # mean, by page cache alone; only over blocks that have a prediction
    unpredicted_bytes: float | None
    worst_unpredicted_bytes: float | None
    attribution: Attribution
    complete_blocks: int
    without_capacity: dict[str, int]  # blocks, by arm


def _mean(values: pd.Series) -> float | None:
    known = values.dropna()
    return float(known.mean()) if len(known) else None


def comparison(pairs: pd.DataFrame, arm: str, baseline: str) -> Comparison:
    rows = pairs[pairs["arm"] == arm]
    both = rows[rows["contrast"].notna()]
    values = [float(value) for value in both["contrast"]]
    unpredicted = both["unpredicted_bytes"].dropna()
    none = {"infeasible", "out_of_memory"}
    return Comparison(
        arm, baseline, statistics.paired(values), statistics.equivalence_p(values, MARGIN),
        _mean(both["baseline_kv_cache_bytes"]), _mean(both["delta_kv_cache_bytes"]), _mean(both["predicted_delta_bytes"]), _mean(unpredicted),
        float(unpredicted.abs().max()) if len(unpredicted) else None, attribution.attribute(both), len(rows),
        {arm: int(rows["outcome"].isin(none).sum()), baseline: int(rows["baseline_outcome"].isin(none).sum())},
    )  # fmt: skip


def percent(value: float | None) -> str:
    """A share for people; the sign of a rounded zero is dropped.

    >>> percent(0.0912), percent(-0.00049)
    ('9.1 %', '−0.05 %')
    """
    if value is None:
        return "–"
    shown = f"{100 * value:.{2 if 0 < abs(value) < 0.001 else 1}f}"
    return f"{shown.replace('-', '−') if float(shown) else '0.0'} %"


def _interval(paired: statistics.Paired, sign: float) -> str:
    if paired.low is None or paired.high is None or paired.sd == 0:
        return paired.note
    low, high = sorted((sign * paired.low, sign * paired.high))
    return f"95 % interval {percent(low)} to {percent(high)}"


def _blocks(count: int) -> str:
    return f"{count} block{'' if count == 1 else 's'}"


def _because(found: Comparison) -> str:
    """Which term of the law the difference comes from, and what page cache alone predicts."""
    delta, parts = found.delta_bytes, found.attribution
    if delta is None or not parts.terms or delta == 0:
        return ""
    cache = parts.mean(*PAGE_CACHE)
    means = {name: parts.mean(name) or 0.0 for name in parts.terms if name not in PAGE_CACHE}
    means |= {"page_cache": cache} if cache is not None else {}
    name, size = max(means.items(), key=lambda item: item[1] / delta)
    if found.predicted_bytes is not None and found.unpredicted_bytes is not None and name == "page_cache":
        cause = (
            "It comes from page cache"
            if abs(found.unpredicted_bytes) <= _EXPLAINED * abs(delta)
            else "The largest term is page cache"
        )
        return (
            f" {cause}: −fraction × Δ page cache predicts {format_bytes(abs(found.predicted_bytes))} "
            f"{'less' if found.predicted_bytes < 0 else 'more'}, which leaves {format_bytes(abs(found.unpredicted_bytes))} of the mean to other memory."
        )
    if name == "rest":
        told = abs(delta - size) <= _EXPLAINED * abs(delta)
        return (
            " No term that was read explains it."
            if told
            else f" The largest part, {format_bytes(abs(size))}, is in no term that was read."
        )
    if name == "view" and abs(delta - size) <= _EXPLAINED * abs(delta):
        return (
            f" It is what each arm's memory view counts as free, such as a limit: {format_bytes(abs(size))}."
        )
    cause = "It comes from" if abs(delta - size) <= _EXPLAINED * abs(delta) else "The largest term is"
    return f" {cause} {TERMS.get(name, 'page cache')}: {format_bytes(abs(size))}."


def _difference(found: Comparison) -> str:
    paired, delta = found.contrast, found.delta_bytes
    assert paired.mean is not None  # noqa: S101
    assert delta is not None  # noqa: S101
    less = paired.mean >= 0
    sign = 1.0 if less else -1.0
    share = f"{percent(abs(paired.mean))}, {_interval(paired, sign)}"
    over = f"mean of {_blocks(paired.n)}" if paired.n > 1 else "one block"
    word, other = ("less", "more") if less else ("more", "less")
    if sign * delta > 0:  # large capacities went the other way than most shares
        return (
            f"{found.arm} has in the mean of shares {word} KV cache than {found.baseline} ({share}), and yet {format_bytes(abs(delta))} {other} "
            f"in the mean of bytes, {over}: the contrast is not the same everywhere."
        )
    return (
        f"{found.arm} has {format_bytes(abs(delta))} ({share}) {word} KV cache than {found.baseline}, {over}."
    )


def _no_difference(found: Comparison) -> str:
    paired = found.contrast
    text = (
        f"No divergence shown between {found.arm} and {found.baseline}: the mean contrast over {_blocks(paired.n)} is "
        f"{percent(paired.mean)} ({_interval(paired, 1.0)})."
    )
    if found.equivalence_p is not None and found.equivalence_p < 1 - statistics.CONFIDENCE:
        sure = f"TOST p = {found.equivalence_p:.2g}" if paired.sd else "every block agrees exactly"
        return f"{text} Equivalent within ±{percent(MARGIN)} ({sure})."
    return f"{text} That they are equivalent within ±{percent(MARGIN)} is not shown either: more blocks would tell."


def _capacity_only_in_one(found: Comparison) -> str:
    parts = [
        f"{arm} had no KV capacity in {count} of {_blocks(found.complete_blocks)}"
        for arm, count in found.without_capacity.items()
        if count
    ]
    return f" {'; '.join(parts)}." if parts else ""


def sentence(found: Comparison, noise_floor: float | None = None, of: str = "this run") -> str:
    """The verdict on one arm. `noise_floor`: largest contrast that two equal arms showed, `of` this run or of its pilot."""
    paired = found.contrast
    if paired.n == 0:
        if found.complete_blocks == 0:
            return f"No complete block of {found.arm} and {found.baseline}: there is no contrast."
        return f"No block in which both {found.arm} and {found.baseline} have KV capacity: there is no contrast.{_capacity_only_in_one(found)}"
    exact = paired.n > 1 and paired.sd == 0 and paired.mean != 0
    if paired.n == 1 and paired.mean == 0:
        text = f"{found.arm} and {found.baseline} have the same KV cache in the one block there is: no interval, so no verdict."
    elif paired.n == 1 or paired.excludes_zero or exact:
        text = _difference(found)
        if noise_floor is not None and paired.mean is not None and abs(paired.mean) <= noise_floor:
            text += f" Two equal arms of {of} differ by up to {percent(noise_floor)}: this is not above the noise."
        else:
            text += _because(found)
    else:
        text = _no_difference(found)
    return text + _capacity_only_in_one(found)


def noise_sentence(twin: noise.Twin) -> str:
    """What two equal arms of this run say about its noise."""
    found = twin.contrast
    pair = f"{twin.baseline} and {twin.arm} are the same (A/A)"
    if found.n < 2:
        return f"Noise floor: not known, {pair} but share {_blocks(found.n)}."
    if found.sd == 0:
        return f"Noise floor: {percent(twin.floor)}: {pair} and the contrast is the same in all of {_blocks(found.n)}."
    shown = "yet they diverge" if found.excludes_zero else "no divergence is declared"
    return (
        f"Noise floor: {percent(twin.floor)} (largest bound of the contrast): {pair}, {shown}, standard deviation {percent(found.sd)} a block; "
        f"{_blocks(found.n)} like these show a contrast of {percent(twin.detectable)} with 80 % power."
    )
