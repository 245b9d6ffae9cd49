"""Every arm against the baseline, block by block: how much KV, how much was predicted, and from which term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from spark_ray.divergence import contrast

from .attribution import TERMS, column, decompose, delta, known, law_holds, view_of
from .frames import BASIC, table
from .reading import COUNT, FLAG, NUMBER, TEXT

_KINDS = {
    "block_id": TEXT, "block_index": COUNT, "arm": TEXT, "baseline": TEXT,
    "max_batch_size": COUNT, "max_num_tokens": COUNT, "memory_fraction": NUMBER, "knobs": TEXT,
    "baseline_outcome": TEXT, "outcome": TEXT, "before_baseline": FLAG,
    "baseline_kv_cache_bytes": COUNT, "kv_cache_bytes": COUNT, "delta_kv_cache_bytes": COUNT, "contrast": NUMBER,
    "delta_page_cache_bytes": COUNT, "predicted_delta_bytes": NUMBER, "unpredicted_bytes": NUMBER,
    **{column(name): NUMBER for name in TERMS},
}  # fmt: skip


def predicted(base: Any, arm: Any) -> float | None:
    """Difference in KV bytes that page cache alone would make: -fraction x (cache of the arm - of the baseline)."""
    views = {view_of(row) for row in (base, arm)}
    change, fraction = delta(base, arm, "sizing_page_cache_bytes"), known(base["sizing_fraction"])
    if views != {"memfree"} or change is None or fraction is None or not (law_holds(base) and law_holds(arm)):
        return None
    return -fraction * change


def has_capacity(row: Any) -> bool:
    return bool(pd.notna(row["outcome"]) and row["outcome"] == "ok" and pd.notna(row["kv_cache_bytes"]))


def _pair(base: Any, arm: Any) -> dict[str, Any]:
    row = {name: known(base[name]) for name in BASIC} | {
        "knobs": base["knobs"],
        "block_id": base["block_id"], "block_index": base["block_index"], "arm": arm["arm"], "baseline": base["arm"],
        "baseline_outcome": base["outcome"], "outcome": arm["outcome"],
    }  # fmt: skip
    positions = known(base["position"]), known(arm["position"])
    row["before_baseline"] = None if None in positions else bool(arm["position"] < base["position"])
    before = known(base["kv_cache_bytes"]) if has_capacity(base) else None
    after = known(arm["kv_cache_bytes"]) if has_capacity(arm) else None
    row |= {"baseline_kv_cache_bytes": before, "kv_cache_bytes": after}
    if before is None or after is None:
        return row
    change, expected = after - before, predicted(base, arm)
    return row | {
        "delta_kv_cache_bytes": change,
        "contrast": contrast(before, after) if before > 0 else None,
        "delta_page_cache_bytes": delta(base, arm, "sizing_page_cache_bytes"),
        "predicted_delta_bytes": expected,
        "unpredicted_bytes": None if expected is None else change - expected,
        **{column(name): value for name, value in decompose(base, arm).items()},
    }


def pairs(trials: pd.DataFrame, arms: Sequence[str], baseline: str) -> pd.DataFrame:
    """One row per complete block and arm other than the baseline, in block and arm order.

    Only attempts that count are paired. Where an arm has no capacity its row stays, with its outcome and no numbers.
    """
    valid = trials[trials["standing"] == "counts"]
    rows = []
    for _, block in valid.groupby("block_id", sort=False):
        by_arm = {str(row["arm"]): row for _, row in block.iterrows()}
        if baseline in by_arm:
            rows += [
                _pair(by_arm[baseline], by_arm[arm]) for arm in arms if arm in by_arm and arm != baseline
            ]
    return table(rows, _KINDS)
