"""TensorRT-LLM's sizing law (PyTorch backend, `KvCacheCreator`), as data, and its terms as the log says them.

    available = (total - peak + temporary KV) x fraction

The engine profiles itself with a small temporary KV cache, which is in the peak and is given back; hence it is added again.
The peak is what torch held at most plus everything on the device that is not torch's: on unified memory the rest of the
machine, page cache included. When the final cache is built free memory is read once more, and the pool is the smaller of the
two, fraction x free; bytes become whole tokens, and tokens whole blocks: rounded up in older versions, down in newer ones.

The log prints sizes in steps of 0.01 GiB. `interval` says what pools those rounded terms allow.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from .tensorrt_llm_log import Log

LAW = "(total - peak + temporary KV) x fraction"
Rounding = Literal["floor", "ceil"]


def available_bytes(total: int, peak: int, temporary_kv: int, fraction: float) -> int:
    """What the dry run allows the pool; nothing where the peak is above the total."""
    return max(0, int((total - peak + temporary_kv) * fraction))


def final_bytes(free: int, fraction: float) -> int:
    """What the second reading allows, when the final cache is built."""
    return int(free * fraction)


def tokens(available_bytes: int, bytes_per_token: int, tokens_per_block: int, rounding: Rounding) -> int:
    """Tokens of the pool: whole tokens of the bytes, then whole blocks of the tokens."""
    whole = max(0, available_bytes) // bytes_per_token
    blocks = -(-whole // tokens_per_block) if rounding == "ceil" else whole // tokens_per_block
    return blocks * tokens_per_block


def rounding_of(version: str) -> Rounding | None:
    """How `calculate_max_num_blocks` rounds tokens to blocks; None where that was not established.

    Up was read in code up to 1.1 (and seen in a log of 1.1.0rc3), down in code of 1.3 and 1.4. It changed while 1.2 was made.
    """
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    if match is None:
        return None
    release = int(match[1]), int(match[2])
    if release <= (1, 1):
        return "ceil"
    return "floor" if (1, 3) <= release <= (1, 4) else None


class Interval(NamedTuple):
    """What the pool may be, both ends included."""

    low_bytes: int
    high_bytes: int
    low_tokens: int
    high_tokens: int


def interval(log: Log) -> Interval | None:
    """What the law gives for every set of terms that prints like this one; None where a term was not said."""
    total, peak, temporary, fraction = log.total_bytes, log.peak_bytes, log.temporary_kv_bytes, log.fraction
    if total is None or peak is None or temporary is None or fraction is None:
        return None
    if log.bytes_per_token is None or log.bytes_per_token == 0:
        return None
    step = log.resolution_bytes or 0
    spread = 3 * step // 2 + 1  # three terms, each half a step off at most
    low, high = (available_bytes(total + off, peak, temporary, fraction) for off in (-spread, spread))
    if log.limits and log.estimated_bytes is not None:  # a cap of the user, printed rounded
        low, high = min(low, max(0, log.estimated_bytes - step)), min(high, log.estimated_bytes + step)
    if log.final_free_bytes is not None:
        final = final_bytes(log.final_free_bytes, fraction)
        low, high = min(low, final), min(high, final)
    fixed = log.fixed_cost_bytes or 0
    known = rounding_of(log.version or "")
    block = log.tokens_per_block or 1
    return Interval(
        low,
        high,
        tokens(low - fixed, log.bytes_per_token, block, known or "floor"),
        tokens(high - fixed, log.bytes_per_token, block, known or "ceil"),
    )


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


def sizing(log: Log, fraction: float, total_bytes: int | None = None) -> dict[str, Any] | None:
    """measurements["sizing"] from the log; None when it says nothing of the peak.

    `total_bytes` stands in where the log does not print the total (before 1.0): what cudaMemGetInfo answers.
    """
    if log.peak_bytes is None or log.available_bytes is None:
        return None
    total = total_bytes if log.total_bytes is None else log.total_bytes
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
