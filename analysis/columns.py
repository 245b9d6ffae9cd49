"""What each column of the parquet tables means: the field of the record it is read from, or how it is derived."""

from __future__ import annotations

from typing import NamedTuple

from . import frames, gpu, host, matmul, sizing

_MEMORY = {name: " + ".join(fields) for name, fields in frames.MEMORY.items()} | {
    "page_cache_bytes": "Cached + Buffers − Shmem",
    "swap_used_bytes": "SwapTotal − SwapFree",
}
_MEANINGS: dict[str, dict[str, str]] = {
    "trials": {
        "standing": "counts, open (its block is not complete yet) or superseded (its block ran again)",
        "max_batch_size": "sequences that the engine runs at once, at most",
        "max_num_tokens": "tokens of one engine step, at most",
        "memory_fraction": "share of the memory found free that may become KV cache",
        "knobs": "further knobs of the configuration as JSON, by their place in the YAML; sizes in bytes, durations in seconds",
        "environment": "kind of environment",
        "engine": "kind of engine",
        "block_index": "place of the block in the run, from 0",
        "treatment": "host state asked for, in words",
        "setup": "environment, treatment, engine and executor in words: equal for arms that are the same",
        "fake": "true: no engine ran, the numbers mean nothing",
        "simulated": "true: capacities come from a formula",
        "probe": "true: the sizing law over real memory, no inference engine ran",
        "engine_is_double": "true: a test double stood in for the engine's library, the numbers are no measurements",
        "sizing_moment": "how near to the reading of free memory that decides the host looked: hook, log line, before start (TensorRT-LLM)",
        "sizing_estimated_bytes": "of sizing.terms: what the engine estimated for the pool after caps (TensorRT-LLM)",
        "sizing_outside_bytes": "of sizing.terms: memory in use that is not torch's; on unified memory by anybody (TensorRT-LLM)",
        "first_token_p50_s": "median time to the first token, in seconds",
        "first_token_p99_s": "99th percentile of the time to the first token, in seconds",
        "inter_token_p50_s": "median time between two tokens of a request, in seconds",
        "inter_token_p99_s": "99th percentile of the time between two tokens of a request, in seconds",
        "sizing_per_cpu_free_bytes": "at the sizing moment: free pages in per-CPU lists",
        "sizing_own_anon_bytes": "at the sizing moment: anonymous memory of the worker's process tree",
        "sizing_other_anon_bytes": "at the sizing moment: AnonPages less the worker's own",
        "peak_memory_bytes": "largest proportional set size of the worker's process tree at a phase",
        "peak_memory_source": "side on which that was read",
        "cgroup_peak_bytes": "largest peak of the worker's group, page cache included",
        "swap_used_bytes": "largest SwapTotal − SwapFree of all readings",
        "mem_total_change_bytes": "largest less smallest MemTotal of all readings: 0 on a machine that keeps its memory",
        "outside_readable": "whether the host could look at the worker's root",
        **gpu.MEANINGS,
        **sizing.MEANINGS,
        **host.MEANINGS,
        **matmul.MEANINGS,
        **{f"sizing_{name}": f"at the sizing moment: {words}" for name, words in _MEMORY.items()},
    },
    "phases": {
        "standing": "as in trials",
        "side": "inside: read by the worker; outside: by the host",
        "memory_stall_us": "some task waited for memory, since boot, microseconds",
        **_MEMORY,
    },
}


class Column(NamedTuple):
    name: str
    kind: str
    source: str | None
    """Path of the field in the record; of an observation, in the `phases` table. None: derived."""
    meaning: str | None
    """None: what the record's field means."""


def columns(table: str) -> list[Column]:
    """The columns of `trials` or `phases`, as they are written."""
    frame = frames.trials([], {}) if table == "trials" else frames.phases([])
    paths = {name: path for name, (_, path) in frames.TRIAL.items()}
    if table == "phases":
        paths |= {name: ("inside[]", *path) for name, (_, path) in frames.PHASE.items()}
    paths.pop("standing")  # added by the store: it is about other attempts as well
    meanings = _MEANINGS[table]
    return [
        Column(name, str(kind), ".".join(paths[name]) if name in paths else None, meanings.get(name))
        for name, kind in zip(map(str, frame.columns), frame.dtypes, strict=True)
    ]


SAMPLES = {
    "monotonic_s": "CLOCK_MONOTONIC, as in observations",
    "mem_free_bytes": "MemFree",
    "mem_available_bytes": "MemAvailable",
    "cached_bytes": "Cached + Buffers",
    "anon_bytes": "AnonPages",
    "shmem_bytes": "Shmem",
    "per_cpu_free_bytes": "free pages in per-CPU lists, in no other counter",
    "memory_stall_us": "some task waited for memory, since boot, microseconds",
    "cgroup_usage_bytes": "usage of the worker's group, page cache included; absent before and after its life",
    "cgroup_anon_bytes": "anonymous memory of the worker's group",
    "cgroup_file_bytes": "page cache of the worker's group",
}
"""Columns of samples/*.parquet: the fields of samples.json."""

MAP = {
    "AXIS": "each axis of the search, one column by its name: values of the grid, or the one value",
    "kv_ARM_mean_bytes": "expected KV capacity if the arm works; throughput_ARM_mean_tokens_per_s where that was mapped",
    "kv_ARM_sd_bytes": "how unsure that is, without the noise of a single trial",
    "feasible_ARM": "how probably the arm has any capacity, 0 to 1",
    "feasible_both": "how probably both have: not the product, as they need the same least capacity",
    "contrast_mean": "expected 1 − KV(against) / KV(baseline), if both work",
    "contrast_sd": "how unsure that is",
    "divergence_probability": "how probably the contrast exceeds the margin, or one arm alone works (target boundary: the latter); bands as wide as the stopping rule has them",
    "undecided": "true: that probability is neither below 0.025 nor above 0.975",
    "simulated": "true: capacities come from a formula",
    "engine_is_double": "true: a test double stood in for the engine's library",
}
"""Columns of map.parquet. ARM is the baseline and the other arm, in turn; AXIS is written out."""
