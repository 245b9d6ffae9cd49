"""What NVML said during an attempt, as columns of the trial table and as reasons to doubt. All devices of the host together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .reading import COUNT, NUMBER, TEXT, Record, at, count, number, observations, text

COLUMNS = {
    "gpu_memory_before_bytes": COUNT,
    "gpu_peak_memory_bytes": COUNT,
    "gpu_start_temperature_celsius": COUNT,
    "gpu_peak_temperature_celsius": COUNT,
    "gpu_peak_power_w": NUMBER,
    "gpu_energy_j": NUMBER,
    "gpu_lowest_sm_clock_mhz": COUNT,
    "gpu_throttle_reasons": TEXT,
    "gpu_processes_before": COUNT,
    "gpu_exposure": TEXT,
}
MEANINGS = {
    "gpu_memory_before_bytes": "device memory in use before the worker started, all devices",
    "gpu_peak_memory_bytes": "largest device memory in use at a phase, all devices",
    "gpu_start_temperature_celsius": "hottest device before the worker started",
    "gpu_peak_temperature_celsius": "hottest device at any phase",
    "gpu_peak_power_w": "largest power drawn at a phase, watts, all devices",
    "gpu_energy_j": "energy from before the start until after the end, joules, all devices",
    "gpu_lowest_sm_clock_mhz": "lowest multiprocessor clock at a phase while the worker lived, MHz",
    "gpu_throttle_reasons": "reasons for reduced clocks at any phase while the worker lived; idle is none",
    "gpu_processes_before": "compute processes on the devices before the worker started: anybody else's",
    "gpu_exposure": "how an isolated guest was given the GPU: request (--gpus), cdi (--device), devices (driver files, bound)",
}
_WANTED_CLOCKS = {"idle", "applications_clocks_setting", "display_clock_setting"}


def _devices(seen: Mapping[str, Any] | None) -> list[Any]:
    found = at(seen, "gpus")
    return found if isinstance(found, list) else []


def _list(value: Any) -> list[Any] | None:
    return value if isinstance(value, list) else None


def _over_devices(
    seen: Mapping[str, Any] | None, name: str, together: Callable[[list[float]], float]
) -> float | None:
    """One figure of a reading; None when a device does not say it."""
    devices = _devices(seen)
    if not devices:
        return None
    values = [number(at(device, name)) for device in devices]
    known = [value for value in values if value is not None]
    return together(known) if len(known) == len(values) else None


def _extreme(values: list[float | None], choose: Callable[[list[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else count(round(value))


def of_record(record: Record) -> dict[str, Any]:
    """The columns above; absent where there is no GPU or it does not answer."""
    seen = [each for each in observations(record, "outside") if _devices(each)]
    exposure = {"gpu_exposure": text(at(record, "content", "gpu", "exposure"))}
    if not seen:
        return exposure
    before = next((each for each in seen if each.get("phase") == "before_launch"), None)
    after = next((each for each in seen if each.get("phase") == "after_exit"), None)
    live = [each for each in seen if each is not before and each is not after]
    energy = [_over_devices(each, "energy_j", sum) for each in (before, after)]
    reasons = {
        word
        for each in live
        for device in _devices(each)
        for word in _list(at(device, "throttle_reasons")) or ()
        if text(word) and word not in _WANTED_CLOCKS
    }
    processes = [_list(at(device, "processes")) for device in _devices(before)]
    everybody = [each for each in processes if each is not None]
    return exposure | {
        "gpu_memory_before_bytes": _whole(_over_devices(before, "memory_used_bytes", sum)),
        "gpu_peak_memory_bytes": _whole(_extreme([_over_devices(s, "memory_used_bytes", sum) for s in live], max)),
        "gpu_start_temperature_celsius": _whole(_over_devices(before, "temperature_celsius", max)),
        "gpu_peak_temperature_celsius": _whole(_extreme([_over_devices(s, "temperature_celsius", max) for s in seen], max)),
        "gpu_peak_power_w": _extreme([_over_devices(s, "power_w", sum) for s in seen], max),
        "gpu_energy_j": energy[1] - energy[0] if energy[0] is not None and energy[1] is not None else None,
        "gpu_lowest_sm_clock_mhz": _whole(_extreme([_over_devices(s, "sm_clock_mhz", min) for s in live], min)),
        "gpu_throttle_reasons": ", ".join(sorted(reasons)),
        "gpu_processes_before": sum(map(len, everybody)) if processes and len(everybody) == len(processes) else None,
    }  # fmt: skip
