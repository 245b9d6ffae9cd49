"""Every arm against the baseline, block by block: how much KV, how much was predicted, and from which term.

The decomposition follows the engine's sizing law, KV = fraction x (free - transient):

    dKV = f (dfree - dtransient) + engine,    dfree = dMemTotal - dcache - dper_cpu - ... - rest

`engine` (rounding to blocks, caps) and `rest` (pages in no counter, and every term that was not read) close the two
sums, so the terms add up to the measured difference exactly, whatever is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from spark_ray.divergence import contrast

from .frames import table
from .reading import COUNT, FLAG, NUMBER, TEXT

CONFIGURATION = ("max_batch_size", "max_num_tokens", "memory_fraction")
LAW = "(total - peak) x fraction"

_HOST_TERMS = {
    "page_cache": "sizing_page_cache_bytes",
    "per_cpu_free": "sizing_per_cpu_free_bytes",
    "own_anonymous": "sizing_own_anon_bytes",
    "other_anonymous": "sizing_other_anon_bytes",
    "shared_memory": "sizing_shmem_bytes",
    "kernel": "sizing_kernel_bytes",
}
TERMS = {
    "page_cache": "page cache",
    "per_cpu_free": "free pages in per-CPU lists",
    "own_anonymous": "the engine's own memory",
    "other_anonymous": "memory of other processes",
    "shared_memory": "shared memory",
    "kernel": "kernel (slab, stacks, page tables)",
    "memory_total": "MemTotal",
    "view": "what the memory view counts (a limit, reclaimable cache)",
    "rest": "rest: in no counter",
    "transient": "the engine's profiling peak",
    "engine": "block rounding and caps",
}
"""Terms of a difference in KV bytes, in the order of the law, with words for people."""

_KINDS = {
    "block_id": TEXT, "block_index": COUNT, "arm": TEXT, "baseline": TEXT,
    "max_batch_size": COUNT, "max_num_tokens": COUNT, "memory_fraction": NUMBER,
    "baseline_outcome": TEXT, "outcome": TEXT, "before_baseline": FLAG,
    "baseline_kv_cache_bytes": COUNT, "kv_cache_bytes": COUNT, "delta_kv_cache_bytes": COUNT, "contrast": NUMBER,
    "delta_page_cache_bytes": COUNT, "predicted_delta_bytes": NUMBER, "unpredicted_bytes": NUMBER,
    **{f"term_{name}_bytes": NUMBER for name in TERMS},
}  # fmt: skip


def _known(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _delta(base: Any, arm: Any, column: str) -> float | None:
    before, after = _known(base[column]), _known(arm[column])
    return None if before is None or after is None else after - before


def sees_mem_free(row: Any) -> bool:
    """Whether what this engine took for free was MemFree itself, plus or minus what its view says; no limit ruled."""
    free, mem_free = _known(row["sizing_free_bytes"]), _known(row["sizing_mem_free_bytes"])
    view = row["sizing_view"]
    return not pd.isna(view) and (
        view in {"memfree", "memavailable"} or (view == "cgroup" and free == mem_free)
    )


def law_holds(row: Any) -> bool:
    return not pd.isna(row["sizing_law"]) and row["sizing_law"] == LAW


def decompose(base: Any, arm: Any) -> dict[str, float | None]:
    """Terms of KV(arm) - KV(base) in bytes; all None when a term of the law itself is missing."""
    terms: dict[str, float | None] = dict.fromkeys(TERMS)
    kv, free = _delta(base, arm, "kv_cache_bytes"), _delta(base, arm, "sizing_free_bytes")
    transient, fraction = _delta(base, arm, "sizing_transient_bytes"), _known(base["sizing_fraction"])
    if (
        kv is None
        or free is None
        or transient is None
        or fraction is None
        or not (law_holds(base) and law_holds(arm))
    ):
        return terms
    if sees_mem_free(base) and sees_mem_free(arm):
        mem_free = _delta(base, arm, "sizing_mem_free_bytes")
        terms["view"] = fraction * (free - (mem_free or 0.0))
        total = _delta(base, arm, "sizing_mem_total_bytes")
        terms["memory_total"] = None if total is None else fraction * total
        for name, column in _HOST_TERMS.items():
            change = _delta(base, arm, column)
            terms[name] = None if change is None else -fraction * change
        terms["rest"] = fraction * free - sum(value for value in terms.values() if value is not None)
    else:  # a limit or another device ruled: what the host's counters say explains nothing
        terms["view"] = fraction * free
    terms["transient"] = -fraction * transient
    terms["engine"] = kv - fraction * (free - transient)
    return terms


def predicted(base: Any, arm: Any) -> float | None:
    """Difference in KV bytes that page cache alone would make: -fraction x (cache of the arm - of the baseline)."""
    views = {str(row["sizing_view"]) for row in (base, arm)}
    change, fraction = _delta(base, arm, "sizing_page_cache_bytes"), _known(base["sizing_fraction"])
    if views != {"memfree"} or change is None or fraction is None or not (law_holds(base) and law_holds(arm)):
        return None
    return -fraction * change


def _ok(row: Any) -> bool:
    return bool(pd.notna(row["outcome"]) and row["outcome"] == "ok")


def _pair(base: Any, arm: Any) -> dict[str, Any]:
    row = {name: _known(base[name]) for name in CONFIGURATION} | {
        "block_id": base["block_id"], "block_index": base["block_index"], "arm": arm["arm"], "baseline": base["arm"],
        "baseline_outcome": base["outcome"], "outcome": arm["outcome"],
    }  # fmt: skip
    positions = _known(base["position"]), _known(arm["position"])
    row["before_baseline"] = None if None in positions else bool(arm["position"] < base["position"])
    before = _known(base["kv_cache_bytes"]) if _ok(base) else None
    after = _known(arm["kv_cache_bytes"]) if _ok(arm) else None
    row |= {"baseline_kv_cache_bytes": before, "kv_cache_bytes": after}
    if before is None or after is None:
        return row
    delta, expected = after - before, predicted(base, arm)
    return row | {
        "delta_kv_cache_bytes": delta,
        "contrast": contrast(before, after) if before > 0 else None,
        "delta_page_cache_bytes": _delta(base, arm, "sizing_page_cache_bytes"),
        "predicted_delta_bytes": expected,
        "unpredicted_bytes": None if expected is None else delta - expected,
        **{f"term_{name}_bytes": value for name, value in decompose(base, arm).items()},
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
