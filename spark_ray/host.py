"""The outside view: what this host is, and counters read from outside while a guest runs."""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import nvml
from .worker import evidence, observe

SAMPLE_INTERVAL_S = 0.05
SAMPLE_FIELDS = (
    "monotonic_s",
    "mem_free_bytes",
    "mem_available_bytes",
    "cached_bytes",
    "shmem_bytes",
    "per_cpu_free_bytes",
    "cgroup_usage_bytes",
)


def identity() -> dict[str, Any]:
    """This host's own root and namespaces, to compare a guest's with."""
    return {"root": evidence.root_identity("/"), "namespaces": evidence.namespaces()}


def describe() -> dict[str, Any]:
    """What the host is: for the fingerprint."""
    info = observe.meminfo()
    return {
        "hostname": socket.gethostname(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_model": _cpu_model(),
        "memory_total_bytes": info["MemTotal"],
        "swap_total_bytes": info.get("SwapTotal", 0),
        "cgroup_version": observe.cgroup_path("self")[0],
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "overcommit_memory": _read("/proc/sys/vm/overcommit_memory"),
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, Any]]:
    """Name, uuid and driver of each NVIDIA GPU; empty where there is no driver."""
    with nvml.Reader() as reader:
        return reader.describe()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return None


def oom_kills() -> int:
    """Kernel out-of-memory kills since boot, any group."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def releasable_bytes() -> int:
    """Memory that is free or will be without anyone giving it up: MemAvailable plus the per-CPU lists."""
    try:
        waiting = observe.per_cpu_free_bytes()
    except OSError:
        waiting = 0
    return observe.meminfo()["MemAvailable"] + waiting


@dataclass(frozen=True)
class Wait:
    """How a wait for memory ended."""

    reached: bool
    waited_s: float
    wanted_bytes: int
    found_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "reached": self.reached,
            "waited_s": self.waited_s,
            "wanted_bytes": self.wanted_bytes,
            "found_bytes": self.found_bytes,
        }


def wait_for_memory(wanted_bytes: int, longest_s: float, stopped: Callable[[], bool]) -> Wait:
    """Wait until `releasable_bytes` is at least `wanted_bytes`. Gate on memory, never on "the container is gone"."""
    started = time.monotonic()
    while True:
        found = releasable_bytes()
        waited = time.monotonic() - started
        if found >= wanted_bytes or waited >= longest_s or stopped():
            return Wait(found >= wanted_bytes, waited, wanted_bytes, found)
        time.sleep(0.05)


_MEMINFO = re.compile(rb"^(MemFree|MemAvailable|Cached|Shmem): +(\d+) kB", re.MULTILINE)
_PAGESET = re.compile(rb"^ +count: +(\d+)", re.MULTILINE)  # in zoneinfo only pagesets count


class Sampler:
    """Cheap counters every 50 ms into memory; written down after the guest has ended. Counts its own CPU time.

    Files stay open and four fields are picked out: 70 us a row, a third of what `observe` would need. GPUs are asked
    through NVML every 200 ms, which some drivers take milliseconds to answer.
    """

    def __init__(self, pid: int | None, gpus: nvml.Reader) -> None:
        self.rows: list[tuple[float | int | None, ...]] = []
        self.gpu_rows: list[tuple[float | int | None, ...]] = []
        self.cpu_s = 0.0
        self._gpus = gpus
        self._gpus_due_s = 0.0
        self._meminfo = os.open(observe.PROC / "meminfo", os.O_RDONLY)
        self._zoneinfo = self._open(observe.PROC / "zoneinfo")
        self._usage = self._open(self._usage_file(pid)) if pid else None

    @staticmethod
    def _open(path: Path | None) -> int | None:
        try:
            return os.open(path, os.O_RDONLY) if path else None
        except OSError:
            return None

    @staticmethod
    def _usage_file(pid: int) -> Path | None:
        try:
            version, path = observe.cgroup_path(pid)
        except OSError:
            return None
        if version == 1:
            return observe.CGROUP / "memory" / path.lstrip("/") / "memory.usage_in_bytes"
        return observe.CGROUP / path.lstrip("/") / "memory.current"

    def take(self) -> int:
        """One row; returns MemAvailable in bytes."""
        started = time.thread_time()
        info = {
            name: int(value) * 1024 for name, value in _MEMINFO.findall(os.pread(self._meminfo, 1 << 14, 0))
        }
        available: int = info[b"MemAvailable"]
        self.rows.append(
            (
                time.monotonic(),
                info[b"MemFree"],
                available,
                info[b"Cached"],
                info[b"Shmem"],
                self._waiting(),
                self._used(),
            )
        )
        if time.monotonic() >= self._gpus_due_s:
            self.gpu_rows += self._gpus.sample()
            self._gpus_due_s = time.monotonic() + nvml.SAMPLE_INTERVAL_S
        self.cpu_s += time.thread_time() - started
        return available

    def _waiting(self) -> int | None:
        if self._zoneinfo is None:
            return None
        text = b""
        while piece := os.pread(
            self._zoneinfo, 1 << 20, len(text)
        ):  # the kernel may give one NUMA node a read
            text += piece
        return sum(map(int, _PAGESET.findall(text))) * os.sysconf("SC_PAGE_SIZE")

    def _used(self) -> int | None:
        if self._usage is None:
            return None
        try:
            return int(os.pread(self._usage, 64, 0))
        except OSError:  # the group went with its last process
            return None

    def close(self) -> None:
        for descriptor in (self._meminfo, self._zoneinfo, self._usage):
            if descriptor is not None:
                os.close(descriptor)
