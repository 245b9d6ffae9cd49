"""What the NVIDIA driver says from outside a guest. The only home of `pynvml`.

All of it is read through NVML, which makes no CUDA context and takes no device memory. A question that a device does
not answer (GB10 has no device memory of its own) is absent from a reading, with NVML's own words in `absent`: never 0.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import pynvml

SAMPLE_INTERVAL_S = 0.2
GB10_BYTES_PER_S = 273e9
"""Nominal speed of its memory (LPDDR5X). Owners read 231 to 234 GB/s with a kernel."""
SAMPLE_FIELDS = (
    "monotonic_s",
    "device",
    "memory_used_bytes",
    "temperature_celsius",
    "power_w",
    "sm_clock_mhz",
    "throttle_reasons",
    "utilization_percent",
)
_SAMPLED = SAMPLE_FIELDS[2:]

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons, as nvidia-smi names them.
_THROTTLE = {
    0x1: "idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


SLOWED = frozenset(
    {"sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)
"""Reasons that cap the clocks for heat or power, against what was asked of the device."""


def throttle_names(bits: int) -> list[str]:
    """Names of the set bits, lowest first; an unknown bit by its number."""
    return [_THROTTLE.get(1 << n, hex(1 << n)) for n in range(bits.bit_length()) if bits >> n & 1]


def _processes(device: Any) -> list[dict[str, int]]:
    """Compute processes; in a PID namespace of our own NVML gives an empty list, which says nothing."""
    found = []
    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
        used = process.usedGpuMemory  # None where the driver does not keep the books
        found.append({"pid": int(process.pid)} | ({} if used is None else {"used_bytes": int(used)}))
    return found


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "memory_total_bytes": lambda device: int(pynvml.nvmlDeviceGetMemoryInfo(device).total),
    "memory_used_bytes": lambda device: int(pynvml.nvmlDeviceGetMemoryInfo(device).used),
    "temperature_celsius": lambda device: pynvml.nvmlDeviceGetTemperature(
        device, pynvml.NVML_TEMPERATURE_GPU
    ),
    "power_w": lambda device: pynvml.nvmlDeviceGetPowerUsage(device) / 1000,
    "energy_j": lambda device: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000,
    "sm_clock_mhz": lambda device: pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM),
    "max_sm_clock_mhz": lambda device: pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda device: pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_MEM),
    "utilization_percent": lambda device: pynvml.nvmlDeviceGetUtilizationRates(device).gpu,
    "throttle_reasons": lambda device: int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
    "processes": _processes,
}
GATE_QUESTIONS = ("temperature_celsius", "sm_clock_mhz", "max_sm_clock_mhz", "throttle_reasons", "processes")


class Reader:
    """Reads every device of this host while it is open. Where no driver answers, `why_not` says so and readings are empty."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        self.no_library = False
        self._devices: list[Any] = []
        self._open = False
        self._refused: dict[int, dict[str, str]] = {}
        try:
            pynvml.nvmlInit()
            self._open = True
            self._devices = [
                pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
            ]
        except pynvml.NVMLError as error:
            self.why_not = f"no NVIDIA driver answers: {error}"
            self.no_library = isinstance(error, pynvml.NVMLError_LibraryNotFound)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def count(self) -> int:
        return len(self._devices)

    def close(self) -> None:
        if self._open:
            pynvml.nvmlShutdown()
            self._open, self._devices = False, []

    def _ask(self, index: int, name: str) -> tuple[Any, str | None]:
        """(answer, None) or (None, why not). What a device does not support is not asked again: some ask for milliseconds."""
        refused = self._refused.setdefault(index, {})
        if name in refused:
            return None, refused[name]
        try:
            return QUESTIONS[name](self._devices[index]), None
        except pynvml.NVMLError as error:
            if isinstance(error, pynvml.NVMLError_NotSupported):
                refused[name] = str(error)
            return None, str(error)

    def read(self, questions: Iterable[str] = tuple(QUESTIONS)) -> list[dict[str, Any]]:
        """One reading of every device, with what it refuses to answer."""
        readings = []
        for index in range(len(self._devices)):
            answers = {name: self._ask(index, name) for name in questions}
            reading = {"device": index} | {
                name: answer for name, (answer, why) in answers.items() if why is None
            }
            if "throttle_reasons" in reading:
                reading["throttle_reasons"] = throttle_names(reading["throttle_reasons"])
            if absent := {name: why for name, (_, why) in answers.items() if why is not None}:
                reading["absent"] = absent
            readings.append(reading)
        return readings

    def sample(self) -> list[tuple[float | int | None, ...]]:
        """One row of SAMPLE_FIELDS per device: the cheap questions only."""
        return [
            (time.monotonic(), index, *(self._ask(index, name)[0] for name in _SAMPLED))
            for index in range(len(self._devices))
        ]

    def processes(self) -> list[dict[str, int]]:
        """Compute processes on any device, each with its `device`; empty where no device says."""
        asked = ((index, self._ask(index, "processes")[0]) for index in range(len(self._devices)))
        return [{"device": index, **process} for index, found in asked for process in found or ()]

    def describe(self) -> list[dict[str, Any]]:
        """Name, uuid and driver version of each device."""
        found = []
        for device in self._devices:
            try:
                found.append(
                    {
                        "name": pynvml.nvmlDeviceGetName(device),
                        "uuid": pynvml.nvmlDeviceGetUUID(device),
                        "driver": pynvml.nvmlSystemGetDriverVersion(),
                    }
                )
            except pynvml.NVMLError as error:
                found.append({"error": str(error)})
        return found


def fields() -> dict[str, dict[str, str | None]] | str:
    """Which questions each device answers: None is an answer, a text is NVML's refusal. A text: no NVML here."""
    with Reader() as reader:
        if reader.why_not is not None:
            return reader.why_not
        names = [each.get("name", each.get("error")) for each in reader.describe()]
        return {
            f"{reading['device']} {name}": {q: reading.get("absent", {}).get(q) for q in QUESTIONS}
            for name, reading in zip(names, reader.read(), strict=True)
        }


def memory_bandwidth_bytes_per_s() -> float | None:
    """Nominal, of the memory that weights live in; None unless every GPU of this host is one where that is known: GB10."""
    with Reader() as reader:
        names = [each.get("name", "") for each in reader.describe()]
    return GB10_BYTES_PER_S if names and all("GB10" in name.split() for name in names) else None


@functools.cache
def memory_bytes() -> int | None:
    """Memory of all GPUs of this host together; 0 where there is none of their own, None where nobody knows."""
    with Reader() as reader:
        if reader.why_not is not None:
            return 0 if reader.no_library else None
        total = 0
        for reading in reader.read():
            answer = reading.get("memory_total_bytes")
            if answer is None and "Not Supported" not in reading["absent"]["memory_total_bytes"]:
                return None
            total += answer or 0  # not supported: unified memory, it is the host's
        return total
