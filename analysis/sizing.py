"""What held memory at the moment of sizing, as columns: what the attribution divides a difference into.

A cause that the treatment did not ask for (a fill, a ballast) is known to be 0; one that was asked for and not read is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .reading import COUNT, Record, at, count, observations

COLUMNS = dict.fromkeys(
    (
        "sizing_fill_bytes",
        "sizing_ballast_bytes",
        "sizing_model_files_bytes",
        "sizing_orchestrator_bytes",
        "sizing_driver_bytes",
        "sizing_torch_allocated_bytes",
        "sizing_device_own_bytes",
        "sizing_device_others_bytes",
        "sizing_device_driver_bytes",
    ),
    COUNT,
)
MEANINGS = {
    "sizing_fill_bytes": "at the sizing moment: page cache of the fill; 0 where none was asked for",
    "sizing_ballast_bytes": "at the sizing moment: resident memory of the ballast; 0 where none was asked for",
    "sizing_model_files_bytes": "at the sizing moment: page cache of the model's files",
    "sizing_orchestrator_bytes": "anonymous memory of Ray, of this program and of the container daemons: the mean of before and after the attempt",
    "sizing_driver_bytes": "at the sizing moment, unified memory only: the ledger's residual, which the driver holds",
    "sizing_torch_allocated_bytes": "at the sizing moment: device memory in tensors, torch's allocator",
    "sizing_device_own_bytes": "at the sizing moment: memory of the worker and of its engine's processes on their device, NVML",
    "sizing_device_others_bytes": "at the sizing moment: memory of other processes on the worker's device, NVML",
    "sizing_device_driver_bytes": "at the sizing moment: memory in use on the worker's device that no process holds, NVML",
}


def at_sizing(record: Record, side: str) -> Mapping[str, Any] | None:
    """The last reading of phase `sizing`."""
    found = [seen for seen in observations(record, side) if seen.get("phase") == "sizing"]
    return found[-1] if found else None


def reading(record: Record) -> Any:
    """The /proc/meminfo that the engine sized by; on unified memory, where CUDA answered, the worker's of that phase.

    Memory is unified where CUDA's total is MemTotal, as exactly as the engine printed it.
    """
    sizing = at(record, "result", "measurements", "sizing")
    info = at(sizing, "meminfo")
    if info is None and at(sizing, "view") == "cuda":
        seen = at(at_sizing(record, "inside"), "meminfo")
        total, all_memory = count(at(sizing, "total_bytes")), count(at(seen, "MemTotal"))
        if total is None or all_memory is None:
            return None
        return seen if abs(total - all_memory) <= (count(at(sizing, "resolution_bytes")) or 0) else None
    return info


def ledger(record: Record) -> Any:
    """The balance of the host's reading at the sizing moment."""
    found = at(record, "host", "ledger")
    mine = [each for each in found if at(each, "phase") == "sizing"] if isinstance(found, list) else []
    return mine[-1] if mine else None


def orchestrator_bytes(record: Record, moment: str, size: str = "pss_anon_bytes") -> int | None:
    """Memory of all orchestrating processes before or after the attempt; None when a group could not be read."""
    footprint = at(record, "host", "orchestrator", moment)
    groups = footprint.values() if isinstance(footprint, Mapping) else ()
    sizes = [count(at(each, size)) for each in groups if at(each, "processes") not in (None, 0)]
    known = [each for each in sizes if each is not None]
    return sum(known) if isinstance(footprint, Mapping) and len(known) == len(sizes) else None


def _mean(values: list[int | None]) -> int | None:
    known = [each for each in values if each is not None]
    return round(sum(known) / len(known)) if known else None


def _asked(asked: Any, reading_: Any, *, none: bool) -> int | None:
    return 0 if none and asked is not None else count(reading_)


def _asks_no_ballast(treatment: Any) -> bool:
    return isinstance(treatment, Mapping) and treatment.get("ballast", treatment.get("ballast_bytes")) is None


def _device(record: Record) -> dict[str, int | None]:
    """Shares of the device on which the worker has memory; empty where NVML does not say who holds what."""
    gpus = at(at_sizing(record, "outside"), "gpus")
    outside = at(record, "host", "outside")
    known = {each for each in (at(outside, "worker_pid"), at(outside, "pid")) if count(each) is not None}
    for gpu in gpus if isinstance(gpus, list) else ():
        used, listed = count(at(gpu, "memory_used_bytes")), at(gpu, "processes")
        sizes = (
            {at(each, "pid"): count(at(each, "used_bytes")) for each in listed}
            if isinstance(listed, list)
            else {}
        )
        marked = {at(each, "pid") for each in listed if at(each, "own") is True} if sizes else set()
        own = known | marked  # an engine may run in a child of a worker that has nothing there itself
        if not own & sizes.keys() or any(size is None for size in sizes.values()):
            continue
        mine = sum(size or 0 for pid, size in sizes.items() if pid in own)
        every = sum(size or 0 for size in sizes.values())
        return {
            "sizing_device_own_bytes": mine,
            "sizing_device_others_bytes": every - mine,
            "sizing_device_driver_bytes": None if used is None else count(used - every),
        }
    return {}


def is_simulated(record: Record) -> bool:
    """No engine ran and no memory was read: what this host held has no part in the capacity."""
    marked = at(record, "result", "measurements", "engine", "simulated") is True
    return marked or at(record, "engine", "kind") == "simulated"


def of_record(record: Record) -> dict[str, int | None]:
    if is_simulated(record):
        return {}
    treatment, seen = at(record, "treatment"), at(record, "host", "at_sizing")
    inside = at_sizing(record, "inside")
    fill, model = at(treatment, "page_cache"), count(at(inside, "model_files", "resident_bytes"))
    return {
        "sizing_fill_bytes": _asked(fill, at(seen, "fill_resident_bytes"), none=not isinstance(fill, Mapping)),
        "sizing_ballast_bytes": _asked(
            treatment, at(seen, "ballast_resident_bytes"), none=_asks_no_ballast(treatment)
        ),
        "sizing_model_files_bytes": count(at(seen, "model_resident_bytes")) if model is None else model,
        "sizing_orchestrator_bytes": _mean([orchestrator_bytes(record, when) for when in ("before", "after")]),
        "sizing_driver_bytes": count(at(ledger(record), "driver_bytes")),
        "sizing_torch_allocated_bytes": count(at(inside, "cuda", "torch_allocated_bytes")),
        **_device(record),
    }  # fmt: skip
