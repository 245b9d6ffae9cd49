"""TensorRT-LLM's sizing law (PyTorch backend, `KvCacheCreator`), as data, and its terms as the log says them.

    available = (total - peak + temporary KV) x fraction

The engine profiles itself with a small temporary KV cache, which is in the peak and is given back; hence it is added again.
The peak is what torch held at most plus everything on the device that is not torch's: on unified memory the rest of the
machine, page cache included. When the final cache is built free memory is read once more, and the pool is the smaller of the
two, fraction x free; bytes become whole tokens, and tokens whole blocks: rounded up in older versions, down in newer ones.

The log prints sizes in steps of 0.01 GiB: what is off by more than those steps explain, the audit of a run says.
"""

from __future__ import annotations

from typing import Any

from .tensorrt_llm_log import Log

LAW = "(total - peak + temporary KV) x fraction"


def available_bytes(total: int, peak: int, temporary_kv: int, fraction: float) -> int:
    """What the dry run allows the pool; nothing where the peak is above the total."""
    return max(0, int((total - peak + temporary_kv) * fraction))


def final_bytes(free: int, fraction: float) -> int:
    """What the second reading allows, when the final cache is built."""
    return int(free * fraction)


_TERMS = (
    "announced_weights_bytes", "prefetched_bytes", "weights_bytes", "outside_after_load_bytes", "outside_bytes",
    "reserved_encoder_bytes", "reserved_workspace_bytes", "estimated_bytes", "final_free_bytes", "final_total_bytes",
    "allocated_bytes", "device_quota_bytes", "host_quota_bytes", "disk_quota_bytes", "torch_limit_bytes",
)  # fmt: skip


def _free_bytes(log: Log, total: int | None) -> int | None:
    """What was free after the dry run: the total less what the peak is made of, but for what was given back.

    Without a dry run (it can be switched off) the peak is what was in use right after loading.
    """
    outside = log.outside_after_load_bytes if log.activation_bytes is None else log.outside_bytes
    if total is None or log.weights_bytes is None or outside is None:
        return None
    free = total - log.weights_bytes - outside
    return free if 0 <= free <= total else None  # else the lines are not of one engine


def sizing(log: Log, fraction: float) -> dict[str, Any] | None:
    """measurements["sizing"] from the log; None when it says nothing of the peak. Before 1.0 it prints no total."""
    if log.peak_bytes is None or log.available_bytes is None:
        return None
    total = log.total_bytes
    free = _free_bytes(log, total)
    transient = (log.activation_bytes or 0) + (log.reserved_encoder_bytes or 0)
    slack = 2 * (log.resolution_bytes or 0)
    if total is not None and free is not None and abs(total - free + transient - log.peak_bytes) > slack:
        free = None  # the lines do not add up to the peak: they are not of one engine
    values: dict[str, Any] = {
        "law": LAW,
        "view": "cuda",
        "fraction": fraction,
        "total_bytes": total,
        "free_bytes": free,
        "transient_bytes": None if free is None else transient,
        "temporary_kv_bytes": log.temporary_kv_bytes,
        "peak_bytes": log.peak_bytes,
        "available_bytes": max(0, log.available_bytes),
        "resolution_bytes": log.resolution_bytes,
        "read_from": "log",
    }
    if total is not None and log.temporary_kv_bytes is not None:
        allowed = available_bytes(total, log.peak_bytes, log.temporary_kv_bytes, fraction)
        values["law_residual_bytes"] = values["available_bytes"] - allowed
    if log.final_free_bytes is not None:
        values["final_available_bytes"] = final_bytes(log.final_free_bytes, fraction)
    said = {name: getattr(log, name) for name in _TERMS}
    estimate, size = log.estimated_tokens, log.bytes_per_token  # how it is said before 1.1
    if log.estimated_bytes is None and estimate is not None and size is not None:
        said["estimated_bytes"] = estimate * size
    values["terms"] = {name: size for name, size in said.items() if size is not None}
    return {name: value for name, value in values.items() if value is not None}
