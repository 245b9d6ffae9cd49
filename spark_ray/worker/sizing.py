"""How many bytes a KV pool gets: a stated law over a stated view of memory, with every term kept.

The law is TensorRT-LLM's (PyTorch backend, `KvCacheCreator`): available = (total - peak) x fraction, where
peak = what the engine itself needs at most + everything else the view does not call free. With
outside = total - free - own, that is (free - transient) x fraction: transient is what the profiling pass needed
for a moment and gave back. The views differ in what they call total and free:

memfree       MemTotal, MemFree                what cudaMemGetInfo answers on GB10: page cache counts as used
memavailable  MemTotal, MemAvailable           what vLLM and SGLang take there: page cache counts as free
cgroup        min(MemTotal, limit), min(MemFree, limit - charged), where charged is memory that cannot be
              reclaimed (anonymous, shared and kernel), since a limited group's own page cache can be
cuda          cudaMemGetInfo of a discrete GPU
"""

from __future__ import annotations

from typing import Any

from . import observe


def _charged_bytes(group: dict[str, Any]) -> int:
    """Memory of a group that reclaim cannot take back: usage less file cache on the inactive and active lists."""
    stat = group["stat"]
    if group["version"] == 1:
        reclaimable = stat["total_inactive_file"] + stat["total_active_file"]
    else:
        reclaimable = stat["inactive_file"] + stat["active_file"] + stat.get("slab_reclaimable", 0)
    return max(0, int(group["usage_bytes"]) - int(reclaimable))


def read_view(view: str) -> dict[str, Any]:
    """total_bytes and free_bytes of a view now, with the readings they come from, from one read of meminfo."""
    info = observe.meminfo()
    try:  # at once: what is free and what waits in the lists trade places
        waiting = {"per_cpu_free_bytes": observe.per_cpu_free_bytes()}
    except OSError:
        waiting = {}
    values: dict[str, Any] = {"view": view, "total_bytes": info["MemTotal"], "free_bytes": info["MemFree"]}
    if view == "memavailable":
        values["free_bytes"] = info["MemAvailable"]
    elif view == "cgroup":
        group = observe.cgroup()
        if "limit_bytes" in group:
            charged = _charged_bytes(group)
            values["total_bytes"] = min(info["MemTotal"], group["limit_bytes"])
            values["free_bytes"] = min(info["MemFree"], max(0, group["limit_bytes"] - charged))
            values["cgroup_charged_bytes"] = charged
        values["cgroup_limit_bytes"] = group.get("limit_bytes")
    elif view != "memfree":
        raise ValueError(f"no memory view {view!r}")
    return values | {"meminfo": info} | waiting


def size_pool(reading: dict[str, Any], transient_bytes: int, fraction: float) -> dict[str, Any]:
    """The law applied to a reading of `read_view`: adds peak_bytes, available_bytes and the terms."""
    free = reading["free_bytes"]
    return reading | {
        "law": "(total - peak) x fraction",
        "transient_bytes": transient_bytes,
        "peak_bytes": reading["total_bytes"] - free + transient_bytes,
        "fraction": fraction,
        "available_bytes": max(0, int((free - transient_bytes) * fraction)),
    }
