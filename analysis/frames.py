"""Records as tidy tables: one row per attempt, one per attempt x phase x side, one per sample.

Units are in column names. What a record does not say, or says in a shape that cannot be meant, is absent (NA):
never 0, never a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from spark_ray.store import Store
from spark_ray.units import format_bytes

from . import gpu, host, matmul, sizing
from .reading import COUNT, FLAG, NUMBER, READ, TEXT, Record, at, count, number, observations, pick, text

_TERMS = ("result", "measurements", "sizing", "terms")
_LATENCY = ("result", "measurements", "throughput", "latency")
TRIAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": (TEXT, ("run",)),
    "block_id": (TEXT, ("block_id",)),
    "trial_id": (TEXT, ("trial_id",)),
    "arm": (TEXT, ("arm",)),
    "attempt": (COUNT, ("attempt",)),
    "standing": (TEXT, ("standing",)),  # counts, open, superseded: see Store.records
    "position": (COUNT, ("position",)),
    "repetition": (COUNT, ("repetition",)),
    "slot": (TEXT, ("slot",)),
    "outcome": (TEXT, ("outcome", "kind")),
    "reason": (TEXT, ("outcome", "reason")),
    "message": (TEXT, ("outcome", "message")),
    "max_batch_size": (COUNT, ("configuration", "max_batch_size")),
    "max_num_tokens": (COUNT, ("configuration", "max_num_tokens")),
    "memory_fraction": (NUMBER, ("configuration", "memory_fraction")),
    "environment": (TEXT, ("environment", "kind")),
    "engine": (TEXT, ("engine", "kind")),
    "executor": (TEXT, ("executor",)),
    "engine_version": (TEXT, ("result", "measurements", "engine", "version")),
    "spark_ray_version": (TEXT, ("spark_ray_version",)),
    "kv_cache_bytes": (COUNT, ("result", "measurements", "kv_cache", "bytes")),
    "kv_cache_blocks": (COUNT, ("result", "measurements", "kv_cache", "blocks")),
    "kv_cache_tokens": (COUNT, ("result", "measurements", "kv_cache", "tokens")),
    "kv_cache_sequences": (COUNT, ("result", "measurements", "kv_cache", "sequences")),
    "kv_cache_source": (TEXT, ("result", "measurements", "kv_cache", "source")),
    "kv_second_source": (TEXT, ("result", "measurements", "kv_cache", "second_source", "source")),
    "kv_block_tokens": (COUNT, ("result", "measurements", "kv_cache", "tokens_per_block")),
    "kv_bytes_per_token": (COUNT, ("result", "measurements", "kv_cache", "bytes_per_token")),
    "weight_bytes": (COUNT, ("result", "measurements", "model", "weight_bytes")),
    "sizing_moment": (TEXT, ("result", "measurements", "engine", "sizing_moment")),
    "sizing_view": (TEXT, ("result", "measurements", "sizing", "view")),
    "sizing_law": (TEXT, ("result", "measurements", "sizing", "law")),
    "sizing_fraction": (NUMBER, ("result", "measurements", "sizing", "fraction")),
    "sizing_total_bytes": (COUNT, ("result", "measurements", "sizing", "total_bytes")),
    "sizing_free_bytes": (COUNT, ("result", "measurements", "sizing", "free_bytes")),
    "sizing_transient_bytes": (COUNT, ("result", "measurements", "sizing", "transient_bytes")),
    "sizing_peak_bytes": (COUNT, ("result", "measurements", "sizing", "peak_bytes")),
    "sizing_available_bytes": (COUNT, ("result", "measurements", "sizing", "available_bytes")),
    "sizing_temporary_kv_bytes": (COUNT, ("result", "measurements", "sizing", "temporary_kv_bytes")),
    "sizing_final_available_bytes": (COUNT, ("result", "measurements", "sizing", "final_available_bytes")),
    "sizing_estimated_bytes": (COUNT, ("result", "measurements", "sizing", "terms", "estimated_bytes")),
    "sizing_outside_bytes": (COUNT, ("result", "measurements", "sizing", "terms", "outside_bytes")),
    "sizing_resolution_bytes": (COUNT, ("result", "measurements", "sizing", "resolution_bytes")),
    "sizing_law_residual_bytes": (COUNT, ("result", "measurements", "sizing", "law_residual_bytes")),
    "sizing_read_from": (TEXT, ("result", "measurements", "sizing", "read_from")),
    "cgroup_limit_bytes": (COUNT, ("result", "measurements", "sizing", "cgroup_limit_bytes")),
    "cgroup_charged_bytes": (COUNT, ("result", "measurements", "sizing", "cgroup_charged_bytes")),
    "output_throughput_tokens_per_s": (
        NUMBER,
        ("result", "measurements", "throughput", "output_throughput_tokens_per_s"),
    ),
    "first_token_p50_s": (NUMBER, (*_LATENCY, "first_token", "p50_s")),
    "first_token_p99_s": (NUMBER, (*_LATENCY, "first_token", "p99_s")),
    "inter_token_p50_s": (NUMBER, (*_LATENCY, "inter_token", "p50_s")),
    "inter_token_p99_s": (NUMBER, (*_LATENCY, "inter_token", "p99_s")),
    "matmul_flop_per_s": (NUMBER, ("result", "measurements", "matmul", "median_flop_per_s")),
    "fill_resident_bytes": (COUNT, ("host", "at_sizing", "fill_resident_bytes")),
    "exit_code": (COUNT, ("host", "exit_code")),
    "oom_kills": (COUNT, ("host", "oom_kills")),
    "stopped_by": (TEXT, ("host", "stopped_by")),
    "started_at": (TEXT, ("started_at",)),
    "duration_s": (NUMBER, ("host", "duration_s")),
    "wait_s": (NUMBER, ("host", "wait", "waited_s")),
    "wait_reached": (FLAG, ("host", "wait", "reached")),
    "sampling_cpu_s": (NUMBER, ("host", "samples", "cpu_s")),
    "lowest_mem_available_bytes": (COUNT, ("host", "samples", "lowest_mem_available_bytes")),
}
BASIC = ("max_batch_size", "max_num_tokens", "memory_fraction")
"""The knobs that every configuration has, each a column; further ones are together in the column `knobs`."""
_TRIAL_DERIVED = {
    "block_index": COUNT, "knobs": TEXT, "treatment": TEXT, "setup": TEXT, "fake": FLAG, "simulated": FLAG, "probe": FLAG, "engine_is_double": FLAG,
    "sizing_per_cpu_free_bytes": COUNT, "sizing_own_anon_bytes": COUNT, "sizing_other_anon_bytes": COUNT,
    "peak_memory_bytes": COUNT, "peak_memory_source": TEXT, "cgroup_peak_bytes": COUNT, "swap_used_bytes": COUNT,
    "mem_total_change_bytes": COUNT, "outside_readable": FLAG,
}  # fmt: skip
MEMORY = {
    "mem_total_bytes": ("MemTotal",),
    "mem_free_bytes": ("MemFree",),
    "mem_available_bytes": ("MemAvailable",),
    "cached_bytes": ("Cached", "Buffers"),
    "shmem_bytes": ("Shmem",),
    "anon_bytes": ("AnonPages",),
    "kernel_bytes": ("Slab", "KernelStack", "PageTables", "Percpu"),
    "huge_pages_bytes": ("Hugetlb",),
}
"""Columns as sums of meminfo fields. The kernel counts Shmem in Cached; `page_cache_bytes` is without it."""
PHASE: dict[str, tuple[str, tuple[str, ...]]] = {
    "phase": (TEXT, ("phase",)),
    "monotonic_s": (NUMBER, ("monotonic_s",)),
    "cost_s": (NUMBER, ("cost_s",)),
    "per_cpu_free_bytes": (COUNT, ("per_cpu_free_bytes",)),
    "tree_pss_bytes": (COUNT, ("tree", "pss_bytes")),
    "tree_pss_anon_bytes": (COUNT, ("tree", "pss_anon_bytes")),
    "tree_pss_file_bytes": (COUNT, ("tree", "pss_file_bytes")),
    "cgroup_usage_bytes": (COUNT, ("cgroup", "usage_bytes")),
    "cgroup_peak_bytes": (COUNT, ("cgroup", "peak_bytes")),
    "cgroup_limit_bytes": (COUNT, ("cgroup", "limit_bytes")),
    "cgroup_anon_bytes": (COUNT, ("cgroup", "anon_bytes")),
    "cgroup_file_bytes": (COUNT, ("cgroup", "file_bytes")),
    "cuda_free_bytes": (COUNT, ("cuda", "free_bytes")),
    "cuda_total_bytes": (COUNT, ("cuda", "total_bytes")),
    "memory_stall_us": (NUMBER, ("pressure", "some_total_us")),
}
_PHASE_DERIVED = dict.fromkeys((*MEMORY, "page_cache_bytes", "swap_used_bytes"), COUNT)


def memory_terms(info: Any) -> dict[str, int | None]:
    """The columns of a /proc/meminfo reading, in bytes."""
    values: dict[str, int | None] = {}
    for name, fields in MEMORY.items():
        parts = [count(at(info, field)) for field in fields]
        values[name] = sum(part for part in parts if part is not None) if None not in parts else None
    values["page_cache_bytes"] = _difference(values["cached_bytes"], values["shmem_bytes"])
    values["swap_used_bytes"] = _difference(count(at(info, "SwapTotal")), count(at(info, "SwapFree")))
    return {name: count(value) for name, value in values.items()}


def _difference(whole: int | None, part: int | None) -> int | None:
    return None if whole is None or part is None else count(whole - part)


def words(value: Any) -> str:
    """A setting in few words: {"page_cache": {"fill_bytes": 1024}} is "page_cache=fill 1.00 KiB"."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{text(str(key).removesuffix('_bytes'))} {format_bytes(each)}" if str(key).endswith("_bytes") and number(each) is not None
            else f"{text(str(key))}={words(each)}" for key, each in value.items()
        )  # fmt: skip
    return text(value if isinstance(value, str) else json.dumps(value, sort_keys=True)) or ""


_UNTREATED = {"compile_cache": "cold", "swap": "as_is", "ballast": None}


def _set_on_purpose(treatment: Any) -> Any:
    """A treatment without the keys that ask for nothing."""
    if not isinstance(treatment, Mapping):
        return treatment
    return {key: each for key, each in treatment.items() if (key, each) not in _UNTREATED.items()}


def _further(configuration: Any) -> str | None:
    """The further knobs of a configuration as JSON; None where it has none."""
    if not isinstance(configuration, Mapping):
        return None
    found = {str(key): each for key, each in configuration.items() if key not in BASIC}
    return text(json.dumps(found)) if found else None


def configuration(row: Any) -> dict[str, Any]:
    """The configuration that a row is of, by knob; what is not known is left out."""
    found = {name: row[name] for name in BASIC if not pd.isna(row[name])}
    return found if pd.isna(row["knobs"]) else found | json.loads(row["knobs"])


# ---- tables -----------------------------------------------------------------------------------------------


def table(rows: Iterable[Mapping[str, Any]], kinds: Mapping[str, str]) -> pd.DataFrame:
    """Rows as a frame with exactly the columns of `kinds`, also when there are none."""
    rows = list(rows)
    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in rows], dtype=kind) for name, kind in kinds.items()}
    )


def _peak(record: Record) -> tuple[int | None, str | None]:
    """Largest proportional set size of the worker's tree at a phase. What it held between phases is not in it."""
    for side in ("outside", "inside"):
        sizes = [count(at(seen, "tree", "pss_bytes")) for seen in observations(record, side)]
        known = [size for size in sizes if size is not None]
        if known:
            return max(known), f"largest tree PSS at a phase, {side}"
    return None, None


def _setup(record: Record) -> list[Any]:
    """What makes an arm what it is; a user's landscape is told the arm's name besides."""
    parts = [
        record.get(part) for part in ("environment", "treatment", "engine", "executor") if part in record
    ]
    return [*parts, record.get("arm")] if at(record, "engine", "landscape") is not None else parts


def _derived(record: Record, indices: Mapping[str, int]) -> dict[str, Any]:
    outside, inside = observations(record, "outside"), observations(record, "inside")
    infos = [memory_terms(at(seen, "meminfo")) for seen in (*outside, *inside)]
    totals = [info["mem_total_bytes"] for info in infos if info["mem_total_bytes"] is not None]
    swaps = [info["swap_used_bytes"] for info in infos if info["swap_used_bytes"] is not None]
    # Before and after the worker lives, the host reads its own group.
    live = [seen for seen in outside if seen.get("phase") not in ("before_launch", "after_exit")]
    groups = [size for seen in live if (size := count(at(seen, "cgroup", "peak_bytes"))) is not None]
    seen = sizing.at_sizing(record, "inside")
    memory = memory_terms(sizing.reading(record))
    own = count(at(seen, "tree", "pss_anon_bytes"))
    lists = count(at(record, "result", "measurements", "sizing", "per_cpu_free_bytes"))  # beside that meminfo
    peak, source = _peak(record)
    simulated = sizing.is_simulated(record)
    if simulated:  # its machine, where there is one, is not the one that was observed
        own, lists, seen = count(at(record, *_TERMS, "own_bytes")), None, None
        peak, source = None, None
    evidence = at(record, "host", "outside")
    return {
        "block_index": indices.get(text(record.get("block_id")) or ""),
        "knobs": _further(at(record, "configuration")),
        "treatment": words(_set_on_purpose(record.get("treatment"))),
        "setup": words(_setup(record)),
        "fake": at(record, "engine", "kind") == "fake" or at(record, "result", "measurements", "engine", "fake") is True,
        "simulated": simulated,
        "probe": at(record, "engine", "kind") == "probe",
        "engine_is_double": at(record, "engine", "double") is not None
        or at(record, "result", "measurements", "engine", "engine_is_double") is True,
        **{f"sizing_{name}": value for name, value in memory.items()},
        "sizing_per_cpu_free_bytes": count(at(seen, "per_cpu_free_bytes")) if lists is None else lists,
        "sizing_own_anon_bytes": own,
        "sizing_other_anon_bytes": _difference(memory["anon_bytes"], own),
        "peak_memory_bytes": peak,
        "peak_memory_source": source,
        "cgroup_peak_bytes": max(groups, default=None),
        "swap_used_bytes": max(swaps, default=None),
        "mem_total_change_bytes": max(totals) - min(totals) if totals else None,
        "outside_readable": "root" in evidence if isinstance(evidence, Mapping) and evidence else None,
        **gpu.of_record(record),
        **sizing.of_record(record),
        **host.of_record(record),
        **matmul.of_record(record),
    }  # fmt: skip


def trials(records: Iterable[Record], indices: Mapping[str, int]) -> pd.DataFrame:
    """One row per attempt. `indices`: place of each block in the run, by block id."""
    kinds = {name: kind for name, (kind, _) in TRIAL.items()} | _TRIAL_DERIVED | gpu.COLUMNS
    kinds |= sizing.COLUMNS | host.COLUMNS | matmul.COLUMNS
    kinds |= {f"sizing_{name}": COUNT for name in _PHASE_DERIVED}
    return table((pick(record, TRIAL) | _derived(record, indices) for record in records), kinds)


def phases(records: Iterable[Record]) -> pd.DataFrame:
    """One row per attempt, phase and side (inside: read by the worker; outside: by the host)."""
    shared = ("run", "block_id", "trial_id", "arm", "attempt", "standing", "outcome")
    kinds = {name: TRIAL[name][0] for name in shared} | {"side": TEXT}
    kinds |= {name: kind for name, (kind, _) in PHASE.items()} | _PHASE_DERIVED
    rows = []
    for record in records:
        about = pick(record, {name: TRIAL[name] for name in shared})
        for side in ("outside", "inside"):
            rows += [
                about | {"side": side} | pick(seen, PHASE) | memory_terms(seen.get("meminfo"))
                for seen in observations(record, side)
            ]
    return table(rows, kinds)


def samples(folder: Path) -> pd.DataFrame | None:
    """The time series that the host took during one attempt; None when there is none that can be read."""
    try:
        data = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    fields, rows = at(data, "fields"), at(data, "rows")
    if (
        not isinstance(fields, list)
        or not all(isinstance(name, str) for name in fields)
        or not isinstance(rows, list)
    ):
        return None
    kinds = {name: NUMBER if name.endswith("_s") else COUNT for name in fields}
    return table(
        (
            {name: READ[kinds[name]](value) for name, value in zip(fields, row, strict=False)}
            for row in rows
            if isinstance(row, list)
        ),
        kinds,
    )


def block_indices(store: Store) -> dict[str, int]:
    return {block.block_id: block.index for block in store.blocks()}


def write_tables(
    store: Store, trial_table: pd.DataFrame, phase_table: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """trials.parquet, phases.parquet and samples/*.parquet; returns the samples by `<trial>-<attempt>`."""
    trial_table.to_parquet(store.folder / "trials.parquet", index=False)
    phase_table.to_parquet(store.folder / "phases.parquet", index=False)
    target = store.folder / "samples"
    target.mkdir(exist_ok=True)
    found: dict[str, pd.DataFrame] = {}
    for folder in sorted((store.folder / "trials").glob("*/*")):
        series = samples(folder)
        if series is not None:
            name = f"{folder.parent.name}-{folder.name}"
            series.to_parquet(target / f"{name}.parquet", index=False)
            found[name] = series
    return found
