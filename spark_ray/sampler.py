"""Cheap counters between phases: one thread on a fixed schedule, 22 times a second, and what that cost.

Free, available, cached, anonymous and shared memory and the group's usage are in every row; per-CPU lists, stalls (a
counter that only grows) and the group's parts in every second one.

What lies between two rows is not seen: a peak of 50 ms may be. `peak` therefore asks the kernel's own high-water marks,
the group's if the guest has one of its own and the worker's VmHWM, and says which of them cannot tell.
"""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import nvml
from .worker import observe

INTERVAL_S = 0.045
LOOK_INTERVAL_S = 1.0  # which processes compute on a GPU: some drivers take milliseconds to say
FIELDS = (
    "monotonic_s",
    "mem_free_bytes",
    "mem_available_bytes",
    "cached_bytes",
    "anon_bytes",
    "shmem_bytes",
    "per_cpu_free_bytes",
    "memory_stall_us",
    "cgroup_usage_bytes",
    "cgroup_anon_bytes",
    "cgroup_file_bytes",
)
Row = tuple[float | int | None, ...]

SLOW_EVERY = 2  # rows: what moves slowly, or only ever grows, costs as much as the rest together
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _File:
    """A file of the kernel that stays open: a third of the cost of opening it for each row."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor: int | None = os.open(path, os.O_RDONLY)
        except OSError:
            self._descriptor = None

    def read(self, offset: int = 0) -> bytes:
        """What the kernel writes now, from there on: all of it but for zoneinfo. Empty if it is gone or was never there."""
        if self._descriptor is None:
            return b""
        try:
            return os.pread(self._descriptor, 1 << 16, offset)
        except OSError:  # a group goes with its last process
            return b""

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _number(text: bytes, name: bytes) -> int | None:
    """The number behind a name at the start of a line: a quarter of what a regular expression takes."""
    at = text.find(b"\n" + name)
    return None if at < 0 else int(text[at + 1 + len(name) :].split(None, 1)[0])


def _kib(text: bytes, name: bytes) -> int | None:
    found = _number(text, name + b":")
    return None if found is None else found * 1024


class _Group:
    """The worker's accounting group: usage, and the parts of its stat that are anonymous and file pages."""

    def __init__(self, pid: int) -> None:
        version, folder = group_folder(pid)
        v1 = version == 1
        self._usage = _File(folder / ("memory.usage_in_bytes" if v1 else "memory.current"))
        self._stat = _File(folder / "memory.stat")
        self._parts = (b"total_rss ", b"total_cache ") if v1 else (b"anon ", b"file ")

    def usage(self) -> int | None:
        text = self._usage.read()
        return int(text) if text else None

    def parts(self) -> tuple[int | None, ...]:
        stat = b"\n" + self._stat.read()
        return tuple(_number(stat, part) for part in self._parts)

    def close(self) -> None:
        self._usage.close()
        self._stat.close()


def group_folder(pid: int) -> tuple[int, Path]:
    """(version, folder) of the group that accounts a process's memory."""
    version, path = observe.cgroup_path(pid)
    return version, (observe.CGROUP / "memory" if version == 1 else observe.CGROUP) / path.lstrip("/")


class Sampler:
    """Rows from `start` to `stop`, kept in memory and written down after the guest has ended.

    GPUs are asked through NVML every 200 ms; `look` is called every second.
    """

    def __init__(self, gpus: nvml.Reader, look: Callable[[], object] = lambda: None) -> None:
        self.rows: list[Row] = []
        self.gpu_rows: list[Row] = []
        self.cpu_s = 0.0
        self._gpus, self._look = gpus, look
        self._meminfo = _File(observe.PROC / "meminfo")
        self._zoneinfo = _File(observe.PROC / "zoneinfo")
        self._pressure = _File(observe.PROC / "pressure" / "memory")
        self._group: _Group | None = None
        self._running = (
            threading.Lock()
        )  # held until `stop`: waiting for it costs a third of waiting for an Event
        self._running.acquire()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._gpus_due_s = self._look_due_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def attach(self, pid: int) -> None:
        """From now on read the group of this process as well. Called once."""
        try:
            self._group = _Group(pid)
        except OSError:
            self._group = None

    def stop(self) -> None:
        self._running.release()
        self._thread.join()
        for each in (self._meminfo, self._zoneinfo, self._pressure, self._group):
            if each is not None:
                each.close()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self.take()
            self.cpu_s = time.thread_time()
            now = time.monotonic()
            due += INTERVAL_S * max(1, -(-(now - due) // INTERVAL_S))  # what was missed is not made up for
            if self._running.acquire(timeout=due - now):
                return

    def take(self) -> None:
        """One row, and what is due of the GPUs."""
        now = time.monotonic()
        info = self._meminfo.read()
        cached, buffers = _kib(info, b"Cached"), _kib(info, b"Buffers")
        slowly = len(self.rows) % SLOW_EVERY == 0
        self.rows.append(
            (
                now, _kib(info, b"MemFree"), _kib(info, b"MemAvailable"), None if cached is None or buffers is None else cached + buffers,
                _kib(info, b"AnonPages"), _kib(info, b"Shmem"),
                self._waiting() if slowly else None, self._stalled() if slowly else None,
                self._group.usage() if self._group else None,
                *(self._group.parts() if self._group and slowly else (None, None)),
            )
        )  # fmt: skip
        if now >= self._gpus_due_s:
            self.gpu_rows += self._gpus.sample()
            self._gpus_due_s = now + nvml.SAMPLE_INTERVAL_S
        if now >= self._look_due_s:
            self._look()
            self._look_due_s = now + LOOK_INTERVAL_S

    def _waiting(self) -> int | None:
        text = b""
        while piece := self._zoneinfo.read(len(text)):  # the kernel may give one NUMA node a read
            text += piece
        # In zoneinfo only pagesets have a "count:".
        return (
            sum(int(part.split(None, 1)[0]) for part in text.split(b"count:")[1:]) * _PAGE_BYTES
            if text
            else None
        )

    def _stalled(self) -> int | None:
        _, found, rest = self._pressure.read().partition(b"total=")  # the first line is "some"
        return int(rest.split(None, 1)[0]) if found else None

    def series(self) -> dict[str, Any]:
        """samples.json."""
        series: dict[str, Any] = {"fields": FIELDS, "rows": self.rows}
        if self.gpu_rows:
            series |= {"gpu_fields": nvml.SAMPLE_FIELDS, "gpu_rows": self.gpu_rows}
        return series

    def summary(self) -> dict[str, Any]:
        """How densely was really looked, and what that cost."""
        times = [row[0] for row in self.rows if row[0] is not None]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        lowest = min((row[2] for row in self.rows if row[2] is not None), default=None)
        found: dict[str, Any] = {
            "count": len(self.rows), "gpu_count": len(self.gpu_rows), "cpu_s": self.cpu_s,
            "lowest_mem_available_bytes": lowest,
        }  # fmt: skip
        if gaps:
            found |= {
                "interval_s": statistics.median(gaps), "longest_gap_s": max(gaps), "core_share": self.cpu_s / sum(gaps),
            }  # fmt: skip
        return found


# ---- what a peak between two rows is caught by ---------------------------------------------------------------


class Peaks:
    """The kernel's own high-water marks: of the worker, and of its group where no other process is in that."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        self._absent = {"cgroup": "the worker was not seen", "worker": "the worker was not seen"}

    def look(self, worker: int, root: int) -> None:
        """Read them now. `root`: first process of the guest; its descendants are the guest."""
        self._keep("worker", lambda: (high_water_bytes(worker), f"VmHWM of process {worker}"))
        self._keep("cgroup", lambda: own_group_peak(root))

    def told(self, peak_bytes: int | None, source: str) -> None:
        """A last reading of the guest's own group, by whoever removed it."""
        if peak_bytes is not None:
            self._found |= {
                "cgroup_bytes": max(peak_bytes, self._found.get("cgroup_bytes", 0)), "cgroup_source": source,
            }  # fmt: skip
            self._absent.pop("cgroup", None)

    def _keep(self, name: str, read: Callable[[], tuple[int, str]]) -> None:
        try:
            value, source = read()
        except OSError as error:
            if f"{name}_bytes" not in self._found:
                self._absent[name] = error.strerror or str(error)
            return
        self._found |= {f"{name}_bytes": value, f"{name}_source": source}
        self._absent.pop(name, None)

    def as_dict(self) -> dict[str, Any]:
        return self._found | ({"absent": self._absent} if self._absent else {})


def high_water_bytes(pid: int) -> int:
    """VmHWM: the largest resident set that a process ever had."""
    for line in (observe.PROC / str(pid) / "status").read_text(errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("its /proc/PID/status has no VmHWM")  # a process that has ended


def strangers(folder: Path, root: int) -> list[int]:
    """Processes of a group that are not of the guest whose first process is `root`."""
    members = [int(line) for line in (folder / "cgroup.procs").read_text().split()]
    guest = set(observe.descendants(root))
    # 0: a process that this PID namespace cannot see. What ended meanwhile is nobody's.
    return [pid for pid in members if pid not in guest and (pid == 0 or (observe.PROC / str(pid)).exists())]


def own_group(root: int) -> Path | None:
    """Folder of the group that holds the guest and nobody else; None where there is none, or it cannot be seen."""
    try:
        folder = group_folder(root)[1]
        return None if strangers(folder, root) else folder
    except OSError:
        return None


def own_group_peak(root: int) -> tuple[int, str]:
    """(peak, file) of the guest's own group. OSError says why it cannot tell: no such counter, or others are in it."""
    version, folder = group_folder(root)
    others = strangers(folder, root)
    if others:
        raise OSError(
            f"the worker shares its group with {len(others)} other processes: their memory is in it"
        )
    name = "memory.max_usage_in_bytes" if version == 1 else "memory.peak"
    return int((folder / name).read_text()), f"{folder.name}/{name}, page cache included"
