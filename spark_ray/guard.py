"""Whether the host was quiet while a worker ran: counted always, and judged by the bounds of `limits.guard`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from . import conditions, nvml
from .host import Kin, vmstat
from .units import format_bytes
from .worker import observe

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_DEVICE, _CLOCK, _REASONS, _BUSY = map(
    nvml.SAMPLE_FIELDS.index, ("device", "sm_clock_mhz", "throttle_reasons", "utilization_percent")
)
_MOST_STRANGERS = 20
Rows = Sequence[tuple[float | int | None, ...]]


class Guard:
    """Counts from its making until `end`."""

    def __init__(self, gpus: nvml.Reader, kin: Kin) -> None:
        self._gpus, self._kin = gpus, kin
        self._started_s = time.monotonic()
        self._swapped_pages = _swapped_pages()
        self._stalled_us = _stalled_us()
        self._strangers: dict[tuple[int, int], dict[str, Any]] = {}

    def look(self) -> None:
        """Who computes on the GPUs now. Called from the sampler's thread, and at phases."""
        for each in self._kin.foreign(self._gpus.processes()):
            if len(self._strangers) < _MOST_STRANGERS:
                self._strangers.setdefault((each["device"], each["pid"]), each)

    def end(self, gpu_rows: Rows | None) -> dict[str, Any]:
        """All that was counted. `gpu_rows`: samples of the GPUs; None when nobody sampled."""
        counted: dict[str, Any] = {"watched_s": time.monotonic() - self._started_s}
        absent: dict[str, str] = {}
        swapped, stalled = _swapped_pages(), _stalled_us()
        if swapped is None or self._swapped_pages is None:
            absent["swapped_bytes"] = "this kernel's /proc/vmstat has no pswpin and pswpout"
        else:
            counted["swapped_bytes"] = (swapped - self._swapped_pages) * _PAGE_BYTES
        if stalled is None or self._stalled_us is None:
            absent["stalled_share"] = "the kernel has no pressure stall information"
        else:
            counted["stalled_share"] = min(1.0, (stalled - self._stalled_us) / 1e6 / counted["watched_s"])
        self._count_gpus(gpu_rows, counted, absent)
        return counted | ({"absent": absent} if absent else {})

    def _count_gpus(self, rows: Rows | None, counted: dict[str, Any], absent: dict[str, str]) -> None:
        names = ("foreign_gpu_processes", "throttled_share", "busy_sm_clock_mhz")
        if self._gpus.why_not is not None or not self._gpus.count:
            absent |= dict.fromkeys(names, self._gpus.why_not or "this host has no GPU")
            return
        counted["foreign_gpu_processes"] = sorted(self._strangers.values(), key=lambda each: each["pid"])
        if rows is None:
            absent |= dict.fromkeys(names[1:], "limits.sampling is false")
            return
        shares, reasons = _throttled(rows)
        clock = _busy_clock(rows)
        if shares is None:
            absent["throttled_share"] = "no GPU says why its clocks are where they are"
        else:
            counted |= {"throttled_share": shares, "throttle_reasons": reasons}
        if clock is None:
            absent["busy_sm_clock_mhz"] = "no sample of a GPU at work"
        else:
            counted["busy_sm_clock_mhz"] = clock


def _swapped_pages() -> int | None:
    counters = vmstat()
    return counters["pswpin"] + counters["pswpout"] if {"pswpin", "pswpout"} <= set(counters) else None


def _stalled_us() -> float | None:
    return (observe.pressure() or {}).get("some_total_us")


def _of_devices(rows: Rows) -> list[Rows]:
    return [[row for row in rows if row[_DEVICE] == device] for device in {row[_DEVICE] for row in rows}]


def _throttled(rows: Rows) -> tuple[float | None, dict[str, float]]:
    """(share of samples slowed for heat or power, share by reason), of the worst device."""
    worst: tuple[float | None, dict[str, float]] = (None, {})
    for mine in _of_devices(rows):
        bits = [row[_REASONS] for row in mine]
        seen = [nvml.SLOWED & set(nvml.throttle_names(int(each))) for each in bits if each is not None]
        share = sum(map(bool, seen)) / len(seen) if seen else None
        if share is not None and (worst[0] is None or share > worst[0]):
            names = sorted(set().union(*seen))
            worst = share, {name: sum(name in each for each in seen) / len(seen) for name in names}
    return worst


def _busy_clock(rows: Rows) -> float | None:
    """Median clock of the samples in which a kernel was running, of the slowest device."""
    medians = []
    for mine in _of_devices(rows):
        clocks = [row[_CLOCK] for row in mine if row[_BUSY] and row[_CLOCK] is not None]
        if clocks:
            medians.append(float(statistics.median(clock for clock in clocks if clock is not None)))
    return min(medians, default=None)


def not_quiet(counted: dict[str, Any], bounds: conditions.Guard) -> str | None:
    """What happened on the host beyond a bound, and how much; None for a quiet host. What is absent was not seen."""
    found = []
    swapped, stalled, throttled, clock = (
        counted.get(name)
        for name in ("swapped_bytes", "stalled_share", "throttled_share", "busy_sm_clock_mhz")
    )
    if bounds.swapped is not None and swapped is not None and swapped > bounds.swapped:
        found.append(
            f"{format_bytes(swapped)} were swapped, at most {format_bytes(bounds.swapped)} are allowed"
        )
    if bounds.stalled is not None and stalled is not None and stalled > bounds.stalled:
        found.append(
            f"tasks waited for memory in {stalled:.1%} of the time, at most {bounds.stalled:.1%} is allowed"
        )
    if bounds.throttled is not None and throttled is not None and throttled > bounds.throttled:
        why = ", ".join(counted.get("throttle_reasons", ()))
        found.append(
            f"a GPU was slowed in {throttled:.1%} of its samples ({why}), at most {bounds.throttled:.1%} is allowed"
        )
    if bounds.sm_clock_mhz is not None and clock is not None and clock < bounds.sm_clock_mhz:
        found.append(
            f"the median clock of a busy GPU was {clock:.0f} MHz, at least {bounds.sm_clock_mhz} are wanted"
        )
    if bounds.foreign_gpu_processes == "disturb":
        found += [
            f"{each['name']} (process {each['pid']}) computed on GPU {each['device']}"
            for each in counted.get("foreign_gpu_processes", ())
        ]
    return "; ".join(found) or None
