"""Where a difference in KV capacity comes from, term by term along the engine's law.

    KV = fraction x (free - transient + temporary), so that with f = fraction
    dKV = f (dfree - dtransient + dtemporary) + final_reading + engine
    dfree = dMemTotal - dcache - danonymous - ... + dview + rest

Of vLLM's law, KV = fraction x total - peak, each byte that is held costs a whole byte of KV, and one of total is worth f.

Every term is in KV bytes. `temporary` is the KV cache of TensorRT-LLM's dry run, which is in its peak and given back; engines
without one have 0. `final_reading` is what the smaller of two readings took: TensorRT-LLM reads free memory again when it builds
the pool. `engine` (caps, rounding to blocks, and of terms that were printed rounded) and `rest` (pages in no counter, and
whatever was not read) close the two sums, so the terms add up to the measured difference exactly, whatever is missing.

Which readings speak depends on what ruled the memory view: the host's free memory, a limit, or a device of its own. What
did not rule has no part in the difference: its terms are 0. Where the two arms were ruled by different things, `view` has it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from spark_ray.measurements import LAW, LAW_TRT_LLM, LAW_VLLM, SIMULATED

from . import statistics

LAWS = (LAW, LAW_TRT_LLM, LAW_VLLM)
"""Laws along which a difference can be divided; of any other all of it is `rest`."""

TERMS = {
    "memory_total": "total memory",
    "cache_fill": "page cache: the fill",
    "cache_model": "page cache: the model's files",
    "cache_other": "page cache: everything else",
    "per_cpu_free": "free pages in per-CPU lists",
    "shared_memory": "shared memory",
    "ballast": "the ballast",
    "orchestrator": "orchestrator (Ray, this program, container daemons)",
    "other_processes": "other processes",
    "kernel": "kernel (slab, stacks, page tables)",
    "huge_pages": "reserved huge pages",
    "driver": "held by the GPU driver",
    "view": "what the memory view counts (a limit, reclaimable cache)",
    "weights": "the engine's weights",
    "own_other": "the engine's process beside its weights",
    "activations": "activations (the engine's profiling peak)",
    "temporary_kv": "the dry run's own KV cache",
    "final_reading": "final minimum: free memory when the pool was built",
    "engine": "caps and rounding (to blocks, of printed sizes)",
    "rest": "rest: in no counter, or not read",
}
"""Terms of a difference in KV bytes, in the order of the law, with words for people."""
PAGE_CACHE = ("cache_fill", "cache_model", "cache_other")
OWN = ("activations", "temporary_kv", "final_reading", "engine")
"""What the engine does, beside what it finds free."""

Ruler = Literal["host", "limit", "device"]


def known(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def delta(base: Any, arm: Any, column: str) -> float | None:
    before, after = known(base[column]), known(arm[column])
    return None if before is None or after is None else after - before


def law_of(row: Any) -> str | None:
    """The law along which a row was sized, simulated or not; None for one that is not known here."""
    law = None if pd.isna(row["sizing_law"]) else str(row["sizing_law"]).removeprefix(SIMULATED)
    return law if law in LAWS else None


def law_holds(row: Any) -> bool:
    return law_of(row) is not None


def view_of(row: Any) -> str | None:
    return None if pd.isna(row["sizing_view"]) else str(row["sizing_view"]).removeprefix(SIMULATED)


def ruler(row: Any) -> Ruler | None:
    """What decided how much this engine found free; None where its view is not known."""
    view = view_of(row)
    if view in {"memfree", "memavailable"}:
        return "host"
    if view == "cgroup":
        return "host" if known(row["sizing_free_bytes"]) == known(row["sizing_mem_free_bytes"]) else "limit"
    if view == "cuda":  # unified memory: CUDA's total is MemTotal, as exactly as it was printed
        total, all_memory = known(row["sizing_total_bytes"]), known(row["sizing_mem_total_bytes"])
        if total is None or all_memory is None:
            return "device"
        return "host" if abs(total - all_memory) <= (known(row["sizing_resolution_bytes"]) or 0) else "device"
    return None


def _less(whole: float | None, *parts: float | None) -> float | None:
    """What is left of a change when the parts that are known in both arms are taken out."""
    return None if whole is None else whole - sum(part for part in parts if part is not None)


def _on_device(row: Any) -> bool:
    return not pd.isna(row["sizing_view"]) and row["sizing_view"] == "cuda" and not bool(row["probe"])


def _host(base: Any, arm: Any) -> dict[str, float | None]:
    """Changes of free memory, one term for each holder. Parts of one counter are disjoint: a remainder is its own term."""

    def used(column: str) -> float | None:
        return delta(base, arm, column)

    fill, model = used("sizing_fill_bytes"), used("sizing_model_files_bytes")
    own, weights = used("sizing_own_anon_bytes"), used("weight_bytes")
    ballast, orchestrator = used("sizing_ballast_bytes"), used("sizing_orchestrator_bytes")
    driver, free = used("sizing_driver_bytes"), used("sizing_mem_free_bytes")
    in_driver = _on_device(base) and _on_device(arm)  # unified memory: tensors are the driver's
    holder = driver if in_driver else own
    weights = None if holder is None else weights
    changes = {
        "cache_fill": fill,
        "cache_model": model,
        "cache_other": _less(used("sizing_page_cache_bytes"), fill, model),
        "per_cpu_free": used("sizing_per_cpu_free_bytes"),
        "shared_memory": used("sizing_shmem_bytes"),
        "ballast": ballast,
        "orchestrator": orchestrator,
        "other_processes": None
        if own is None
        else _less(used("sizing_anon_bytes"), own, ballast, orchestrator),
        "kernel": used("sizing_kernel_bytes"),
        "huge_pages": used("sizing_huge_pages_bytes"),
        "driver": _less(driver, weights) if in_driver else driver,
        "weights": weights,
        "own_other": own if in_driver else _less(own, weights),
    }
    terms = {name: None if change is None else -change for name, change in changes.items()}
    terms["memory_total"] = used("sizing_mem_total_bytes")
    view = used("sizing_free_bytes")
    terms["view"] = None if view is None or free is None else view - free
    return terms


def _limit(base: Any, arm: Any) -> dict[str, float | None]:
    """Both arms are limited: the limit itself, and what their groups are charged."""
    charged, weights = delta(base, arm, "cgroup_charged_bytes"), delta(base, arm, "weight_bytes")
    weights = None if charged is None else weights
    own = _less(charged, weights)
    return {
        "view": delta(base, arm, "cgroup_limit_bytes"),
        "weights": None if weights is None else -weights,
        "own_other": None if own is None else -own,
    }


def _device(base: Any, arm: Any) -> dict[str, float | None]:
    """A device with memory of its own: total, the engine's process, other processes, the driver."""
    weights = delta(base, arm, "weight_bytes")
    own = delta(base, arm, "sizing_device_own_bytes")
    if own is None:
        own = delta(base, arm, "sizing_torch_allocated_bytes")
    weights = None if own is None else weights
    changes = {
        "weights": weights,
        "own_other": _less(own, weights),
        "other_processes": delta(base, arm, "sizing_device_others_bytes"),
        "driver": delta(base, arm, "sizing_device_driver_bytes"),
    }
    terms = {name: None if change is None else -change for name, change in changes.items()}
    return terms | {"memory_total": delta(base, arm, "sizing_total_bytes")}


_BY_RULER = {"host": _host, "limit": _limit, "device": _device}


def _free(base: Any, arm: Any, change: float) -> dict[str, float | None]:
    """The change of free memory by holder. A holder that does not count in this view is 0, one not read is None."""
    rulers = ruler(base), ruler(arm)
    if None in rulers:
        return {}
    nothing: dict[str, float | None] = dict.fromkeys(TERMS, 0.0)
    if rulers[0] != rulers[1]:
        return nothing | {"view": change}
    return nothing | _BY_RULER[rulers[0] or "host"](base, arm)


def _temporary(row: Any) -> float | None:
    """The dry run's own cache: a law without it has none."""
    return known(row["sizing_temporary_kv_bytes"]) if row["sizing_law"] == LAW_TRT_LLM else 0.0


def _taken(row: Any) -> float | None:
    """What the second reading took from what the first and the user's caps allowed; None where it was not said."""
    if row["sizing_law"] != LAW_TRT_LLM:
        return 0.0
    first, second = known(row["sizing_available_bytes"]), known(row["sizing_final_available_bytes"])
    if first is None or second is None:
        return None
    capped = known(row["sizing_estimated_bytes"])
    return max(0.0, (first if capped is None else min(first, capped)) - second)


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def decompose(base: Any, arm: Any) -> dict[str, float | None]:
    """Terms of KV(arm) - KV(base) in bytes; None for what was not read, and is therefore in `rest`."""
    terms: dict[str, float | None] = dict.fromkeys(TERMS)
    kv, free = delta(base, arm, "kv_cache_bytes"), delta(base, arm, "sizing_free_bytes")
    transient, fraction = delta(base, arm, "sizing_transient_bytes"), known(base["sizing_fraction"])
    laws = {law_of(base), law_of(arm)}
    comparable = None not in laws and (laws == {LAW_VLLM} or LAW_VLLM not in laws)
    if kv is None:
        return terms
    if free is None or transient is None or fraction is None or not comparable:
        return terms | {"rest": kv}
    worth = 1.0 if laws == {LAW_VLLM} else fraction  # KV bytes for a byte of free memory
    by_total = (fraction - worth) * (delta(base, arm, "sizing_total_bytes") or 0.0)
    holders = _free(base, arm, free)
    terms |= {name: None if change is None else worth * change for name, change in holders.items()}
    own: dict[str, float | None] = dict.fromkeys(OWN)
    terms |= own | {"rest": None}
    terms["rest"] = worth * free - sum(value for value in terms.values() if value is not None)
    if by_total:
        terms["memory_total"] = (terms["memory_total"] or 0.0) + by_total
    temporary, taken = _change(_temporary(base), _temporary(arm)), _change(_taken(base), _taken(arm))
    own["activations"] = -worth * transient
    own["temporary_kv"] = None if temporary is None else worth * temporary
    own["final_reading"] = None if taken is None else -taken
    by_law = worth * free + by_total + sum(value for value in own.values() if value is not None)
    own["engine"] = kv - by_law
    return terms | own


# ---- over blocks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attribution:
    """Terms over blocks: means that add up to the mean difference, each with its interval."""

    total: statistics.Paired  # the difference itself, in bytes
    terms: Mapping[str, statistics.Paired]  # a term that was not read in every block is in `rest`
    unread: tuple[str, ...]  # terms read in some blocks only

    @property
    def explained(self) -> float | None:
        """1 - |rest| / |difference|; None where there is no difference to explain."""
        rest, whole = self.mean("rest"), self.total.mean
        return 1 - abs(rest) / abs(whole) if rest is not None and whole else None

    def mean(self, *names: str) -> float | None:
        """Mean of some terms together; None where none of them is known."""
        means = [self.terms[name].mean for name in names if name in self.terms]
        found = [mean for mean in means if mean is not None]
        return sum(found) if found else None


def column(term: str) -> str:
    return f"term_{term}_bytes"


def attribute(pairs: pd.DataFrame) -> Attribution:
    """Over the rows that have a difference (one per block)."""
    rows = pairs[pairs["delta_kv_cache_bytes"].notna()]
    values = {name: [known(value) for value in rows[column(name)]] for name in TERMS}
    unread = [name for name, each in values.items() if None in each and name != "rest"]
    terms = {name: [value or 0.0 for value in each] for name, each in values.items() if name not in unread}
    for name in unread:
        terms["rest"] = [rest + (more or 0.0) for rest, more in zip(terms["rest"], values[name], strict=True)]
    return Attribution(
        statistics.paired([float(value) for value in rows["delta_kv_cache_bytes"]]),
        {name: statistics.paired(each) for name, each in terms.items()} if len(rows) else {},
        tuple(name for name in unread if any(value is not None for value in values[name])),
    )
