"""The outside view: what this host is, and counters read from outside while a guest runs."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import nvml
from .worker import evidence, observe


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


def vmstat(proc: Path = observe.PROC) -> dict[str, int]:
    """Counters of the kernel's memory management since boot."""
    pairs = (line.split() for line in (proc / "vmstat").read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def oom_kills() -> int:
    """Kernel out-of-memory kills since boot, any group."""
    return vmstat().get("oom_kill", 0)


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


class Level:
    """The memory that a host had before the last attempt, within a tolerance, and is to have before the next.

    An engine's may be late by minutes, and would be taken for a difference between arms if it came back between two of a block:
    what is missing is waited for again. Only what stayed away that long once more came to stay, and disturbs once, not for ever.
    """

    def __init__(self, tolerance_bytes: int) -> None:
        self.wanted_bytes = 0
        self._tolerance_bytes = tolerance_bytes
        self._found_bytes: int | None = None  # by the last wait, in vain

    def wait(self, longest_s: float, stopped: Callable[[], bool]) -> Wait:
        """As `wait_for_memory`; where nothing more came back since the last one was in vain, the level is the present one."""
        wait = wait_for_memory(self.wanted_bytes, longest_s, stopped)
        before, self._found_bytes = self._found_bytes, None if wait.reached else wait.found_bytes
        if wait.reached or before is None or wait.found_bytes > before + self._tolerance_bytes:
            return wait
        self._found_bytes = None
        return Wait(True, wait.waited_s, wait.found_bytes, wait.found_bytes)

    def expect_this(self) -> None:
        """An attempt begins at what there is now."""
        self.wanted_bytes = releasable_bytes() - self._tolerance_bytes


def parent_of(pid: int) -> int:
    """The parent of a process; ProcessLookupError when it has ended."""
    try:
        return int(
            (observe.PROC / str(pid) / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1]
        )
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None


def first_of(worker: int) -> int:
    """The first process of a guest: the farthest ancestor in the worker's own group that is not this process.

    A supervisor, the shell of an image's entrypoint, the parent of a PID namespace: whatever it is, its tree is the guest.
    """
    group, found = observe.cgroup_path(worker), worker
    while True:
        parent = parent_of(found)
        if parent in {0, 1, os.getpid()} or observe.cgroup_path(parent) != group:
            return found
        found = parent


class Kin:
    """Which processes are ours: this one's descendants, the guest, and whatever bears the name of this run.

    The last are guests of this run on other slots of this host.
    """

    def __init__(self, variable: str, run_label: str) -> None:
        self._mark = f"{variable}={run_label}".encode()
        self.guest: int | None = None  # first process of the guest, which need not descend from this process

    def foreign(self, processes: Iterable[dict[str, int]]) -> list[dict[str, Any]]:
        """Those of NVML's compute processes that are nobody's of us and still there, with their names."""
        found = []
        ours: set[int] | None = None
        for process in processes:
            if ours is None:  # most looks find no process at all
                ours = set(observe.descendants(os.getpid()))
                ours |= set(observe.descendants(self.guest)) if self.guest is not None else set()
            name = self._stranger(process["pid"]) if process["pid"] not in ours else None
            if name is not None:
                found.append({**process, "name": name})
        return found

    def _stranger(self, pid: int) -> str | None:
        folder = observe.PROC / str(pid)
        try:
            if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                return None
        except FileNotFoundError:  # it has ended, or is in no PID namespace of ours
            return None
        except OSError:  # another user's: certainly not ours
            pass
        return (_read(str(folder / "comm")) or "?")[:64]
