"""`python -I -S watchdog_process.py`: kills a guest before the host runs out of memory. Standard library only, a script.

It stands beside the driver, so that it acts when the driver hangs; it leaves every memory group, locks its own memory
and asks not to be chosen by the kernel, each as far as it may, and says what it got. Lines of JSON on standard input:

    {"guard": {"threshold_bytes": N, "guest": [PID, ...], "group": FOLDER or null, "helpers": [PID, ...], "patience_s": S}}
    {"guard": null}                      rest; answered by {"rested": {...}}

and on standard output: `{"protections": {...}}` first, `{"fired": {...}}` when MemAvailable was below the threshold.

The order of kill: the guest's process trees and what else is in its own group; if memory is still short when patience is
over, the helpers (a ballast). Never the driver: it holds little, and it has to write down what happened. Then it rests.
When standard input closes, the driver has ended, and so does this.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import re
import select
import signal
import sys
import time
from typing import Any

LOOK_EVERY_S = 0.04
_AVAILABLE = re.compile(rb"MemAvailable: +(\d+) kB")
_MCL_CURRENT_AND_FUTURE = 3
_PRIORITY = -10


# ---- protection ---------------------------------------------------------------------------------------------


def _lock_memory() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT_AND_FUTURE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _spare_from_the_kernel() -> None:
    with open("/proc/self/oom_score_adj", "w") as stream:  # noqa: PTH123  pathlib costs 10 ms and 2 MiB here
        stream.write("-1000")


def _memory_group() -> tuple[str, str]:
    """(mount of the hierarchy that accounts memory, this process's path in it)."""
    unified = "/"
    with open("/proc/self/cgroup") as stream:  # noqa: PTH123
        for line in stream.read().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                return "/sys/fs/cgroup/memory", path
            if not controllers:
                unified = path
    return "/sys/fs/cgroup", unified


def _leave_groups() -> None:
    mount, path = _memory_group()
    if path != "/":
        with open(f"{mount}/cgroup.procs", "w") as stream:  # noqa: PTH123
            stream.write(str(os.getpid()))
        path = _memory_group()[1]
        if path != "/":
            raise OSError(f"it stays in {path}")


def _be_first() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)


def protect() -> dict[str, bool | str]:
    """Each protection: true, or the reason why it could not be had."""
    got: dict[str, bool | str] = {}
    wanted = {"cgroup": _leave_groups, "oom_score": _spare_from_the_kernel, "priority": _be_first, "mlock": _lock_memory}  # fmt: skip
    for name, act in wanted.items():
        try:
            act()
            got[name] = True
        except OSError as error:
            got[name] = error.strerror or str(error)
    return got


# ---- looking and killing ------------------------------------------------------------------------------------


def available_bytes(meminfo: int) -> int:
    match = _AVAILABLE.search(os.pread(meminfo, 4096, 0))
    return int(match[1]) * 1024 if match else 1 << 62  # no kernel since 3.14 lacks it


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{task}/children") as stream:  # noqa: PTH123
                found += map(int, stream.read().split())
    return found


def _tree(pid: int) -> list[int]:
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop(0))
        queue += _children(found[-1])
    return found


def _members(group: str | None) -> list[int]:
    if group is None:
        return []
    try:
        with open(f"{group}/cgroup.procs") as stream:  # noqa: PTH123
            return [pid for pid in map(int, stream.read().split()) if pid > 0]  # 0: not of this PID namespace
    except OSError:
        return []


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as stream:  # noqa: PTH123
            return stream.read().strip()
    except OSError:
        return "?"


class Order:
    """What to kill, by handles that name these very processes: a recycled number is not mistaken for one."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.threshold_bytes: int = order["threshold_bytes"]
        self.patience_s: float = order["patience_s"]
        self._group: str | None = order["group"]
        self._guest = self._open(order["guest"])
        self._helpers = self._open(order["helpers"])
        self.killed: dict[int, dict[str, Any]] = {}

    @staticmethod
    def _open(pids: list[int]) -> dict[int, int]:
        handles = {}
        for pid in pids:
            with contextlib.suppress(OSError):
                handles[pid] = os.pidfd_open(pid)
        return handles

    def close(self) -> None:
        for handle in (*self._guest.values(), *self._helpers.values()):
            os.close(handle)

    def kill_guest(self) -> None:
        # Trees first, while their roots live: a dead root's children are found no more but in the group.
        trees = [pid for root, handle in self._guest.items() if not _ended(handle) for pid in _tree(root)]
        for pid in dict.fromkeys([*trees, *_members(self._group)]):
            self._kill(pid, "guest")

    def kill_helpers(self) -> None:
        for pid, handle in self._helpers.items():
            if not _ended(handle):
                self._kill(pid, "helper")

    def _kill(self, pid: int, part: str) -> None:
        name = _name(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            self.killed.setdefault(pid, {"pid": pid, "name": name, "part": part})


def _ended(handle: int) -> bool:
    """Whether the process of a pidfd has ended; a zombie has."""
    return bool(select.select([handle], [], [], 0)[0])


class Watchdog:
    """Looks every 40 ms while there is something to guard."""

    def __init__(self) -> None:
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY)
        self._order: Order | None = None
        self._fired = False
        self._last_s: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._looks, self._longest_s, self._cpu_s = 0, 0.0, time.process_time()
        self._last_s = None

    def serve(self) -> None:
        pending = b""
        while True:
            asleep = self._order is None or self._fired
            ready = select.select([0], [], [], None if asleep else LOOK_EVERY_S)[0]
            if ready:
                piece = os.read(0, 65536)
                if not piece:
                    return
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line)["guard"])
                    self._look()  # at once, however soon the next order comes
            else:
                self._look()

    def _obey(self, order: dict[str, Any] | None) -> None:
        if order is None:
            _say({"rested": {"looks": self._looks, "longest_gap_s": self._longest_s, "cpu_s": time.process_time() - self._cpu_s}})  # fmt: skip
            self._forget()
            self._fired = False
        if self._order is not None:
            self._order.close()
        self._order = Order(order) if order is not None else None

    def _look(self) -> None:
        if self._order is None or self._fired:
            return
        now = time.monotonic()
        if self._last_s is not None:
            self._longest_s = max(self._longest_s, now - self._last_s)
        self._last_s, self._looks = now, self._looks + 1
        found = available_bytes(self._meminfo)
        if found < self._order.threshold_bytes:
            self._fire(self._order, found)

    def _fire(self, order: Order, found: int) -> None:
        at = datetime.datetime.now(datetime.UTC).isoformat()
        order.kill_guest()
        self._fired = True
        deadline = time.monotonic() + order.patience_s
        while time.monotonic() < deadline and available_bytes(self._meminfo) < order.threshold_bytes:
            time.sleep(LOOK_EVERY_S)
            order.kill_guest()  # what it has started meanwhile
        if available_bytes(self._meminfo) < order.threshold_bytes:
            order.kill_helpers()
        _say({"fired": {"at": at, "available_bytes": found, "killed": list(order.killed.values())}})


def _say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the driver's
    watchdog = Watchdog()
    _say({"protections": protect()})
    with contextlib.suppress(BrokenPipeError):
        watchdog.serve()


if __name__ == "__main__":
    main()
    sys.exit(0)
