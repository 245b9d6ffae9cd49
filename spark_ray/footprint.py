"""What everything but the guest holds of this host's memory: this program, its Ray, the container services.

Read before and after each attempt, while no guest lives. Memory is proportional set size (smaps_rollup): shared pages
are counted once, file pages are in it, and what the kernel holds for a process (page tables, sockets) is not. Ray's
processes are those of the session that executes this attempt; another Ray on the host is somebody else's.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .worker import observe

DRIVER = "SPARK_RAY_DRIVER"
"""Environment variable by which an actor knows the driver of its run: BOOT_ID PID, for there may be several hosts."""

_CONTAINER_SERVICES = {
    "docker": {"dockerd", "containerd", "containerd-shim", "docker-proxy"},
    "podman": {"podman", "conmon", "netavark", "aardvark-dns", "slirp4netns", "pasta"},
}
_SESSION = re.compile(rb"session_[0-9_-]+")  # in the command line of every process that Ray starts
_PARTS = {"pss_bytes": "Pss", "pss_anon_bytes": "Pss_Anon"}
_PLASMA = "/plasma"  # how the file of its object store is named in /dev/shm
_KTHREADD = 2  # parent of all kernel threads
_ENDED = (FileNotFoundError, ProcessLookupError)  # between the list of processes and the look at one


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    name: str  # comm: at most 15 characters
    command: bytes


def read(leave_out: Collection[int] = (), proc: Path = observe.PROC) -> dict[str, Any]:
    """Processes and proportional set size by group, and the object store of Ray. A tree in `leave_out` is in none.

    Groups: `spark_ray` (the driver, its helpers, the actor that executes attempts), `ray` (raylet, control store,
    dashboard, agents, idle workers), `docker` and `podman` (the services, not the containers).
    """
    started = time.monotonic()
    found = processes(proc)
    groups = grouped(found, _own(found), leave_out)
    values: dict[str, Any] = {name: _sum(members, proc) for name, members in groups.items()}
    values |= _object_store([pid for pid in groups["ray"] if found[pid].name == "raylet"], proc)
    values["cost_s"] = time.monotonic() - started
    return values


# ---- which process belongs to what ------------------------------------------------------------------------


def processes(proc: Path = observe.PROC) -> dict[int, Process]:
    """Every process there is now, by pid."""
    found = {}
    for entry in os.scandir(proc):
        if not entry.name.isdigit():
            continue
        try:
            head, _, tail = _file(entry.path + "/stat").rpartition(b")")
            state, parent = tail.split()[:2]
            if int(parent) == _KTHREADD or state in b"ZX":  # no memory of their own, and none any more
                continue
            command = _file(entry.path + "/cmdline")
        except OSError:
            continue
        pid, name = int(entry.name), head.split(b"(", 1)[1].decode(errors="replace")
        found[pid] = Process(pid, int(parent), name, command)
    return found


def _file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123  a third of the time of `Path.read_bytes`
        return stream.readall()


def grouped(
    found: Mapping[int, Process], own: Collection[int], leave_out: Iterable[int] = ()
) -> dict[str, list[int]]:
    """Pids by group, each in one. `own`: this process, and the driver of its run where that is another."""
    children: dict[int, list[int]] = {}
    for process in found.values():
        children.setdefault(process.parent, []).append(process.pid)
    left_out = set(_trees(leave_out, children))
    session = _session_of(own, found, children)
    roots = {p.pid for p in found.values() if session and session in p.command and p.pid not in own}
    executing = set(
        _trees([pid for pid in own if _above([pid], found) & roots], children)
    )  # an actor is ours
    ray = set(_trees(roots, children, executing)) - left_out
    members = {"spark_ray": (set(_trees(own, children, ray)) | executing) - left_out, "ray": ray}
    taken = left_out.union(*members.values())
    for name, services in _CONTAINER_SERVICES.items():
        members[name] = {p.pid for p in found.values() if p.name in services} - taken
    return {name: sorted(pids) for name, pids in members.items()}


def _own(found: Mapping[int, Process]) -> set[int]:
    """This process, and the driver if this is an actor on the driver's host."""
    host, _, pid = os.environ.get(DRIVER, "").rpartition(" ")
    driver = {int(pid)} if pid.isdigit() and host == _host() else set()
    return {os.getpid()} | (driver & found.keys())


def driver_name() -> str:
    """What a driver tells its actors, to be put into their environment as `DRIVER`; handed on by its own children."""
    return os.environ.get(DRIVER) or f"{_host()} {os.getpid()}"


def _host() -> str:
    return (observe.PROC / "sys/kernel/random/boot_id").read_text().strip()


def _session_of(
    own: Collection[int], found: Mapping[int, Process], children: Mapping[int, list[int]]
) -> bytes | None:
    """Name of our Ray: of the raylet above this actor, or of the one that this driver started."""
    for pid in (*_above(own, found), *_trees(own, children)):
        if found[pid].name == "raylet" and (match := _SESSION.search(found[pid].command)):
            return match[0]
    return None


def _above(pids: Iterable[int], found: Mapping[int, Process]) -> set[int]:
    above: set[int] = set()
    for pid in pids:
        current = found.get(pid)
        while current is not None and current.parent in found and current.parent not in above:
            above.add(current.parent)
            current = found[current.parent]
    return above


def _trees(
    roots: Iterable[int], children: Mapping[int, list[int]], without: Collection[int] = ()
) -> Iterator[int]:
    """The roots and all that hangs on them, but for what is in `without` and hangs on that."""
    queue, seen = list(roots), set(without)
    while queue:
        pid = queue.pop()
        if pid not in seen:
            seen.add(pid)
            yield pid
            queue += children.get(pid, ())


# ---- what it holds ----------------------------------------------------------------------------------------


def _sum(pids: Iterable[int], proc: Path) -> dict[str, Any]:
    """How many processes, and their proportional set size; absent with the reason if one may not be read."""
    totals: dict[str, int] = dict.fromkeys(_PARTS, 0)
    absent: dict[str, str] = {}
    count = 0
    for pid in pids:
        try:
            values = observe.smaps(pid, proc)
            if not values:  # it is ending, and has nothing mapped any more
                continue
        except OSError as error:
            if isinstance(error, _ENDED) and not (proc / str(pid)).exists():
                continue
            values, absent["pss_bytes"] = {}, f"process {pid}: {error.strerror}"
        count += 1
        kept = ((name, part) for name, part in _PARTS.items() if name in totals and part in values)
        totals = {name: totals[name] + values[part] for name, part in kept}
    return {"processes": count, **totals, **({"absent": absent} if absent else {})}


def _object_store(raylets: Iterable[int], proc: Path) -> dict[str, Any]:
    """Bytes of Ray's object store that are in memory, also counted in the group `ray` as far as they are mapped."""
    files: dict[tuple[int, int], int] = {}
    try:
        for raylet in raylets:
            for entry in (proc / str(raylet) / "fd").iterdir():
                with contextlib.suppress(*_ENDED):  # closed, or ended, meanwhile
                    # Its file has no name any more, so it is found through who holds it open.
                    if _PLASMA in os.readlink(entry):  # noqa: PTH115  "… (deleted)" is no path
                        seen = entry.stat()
                        files[seen.st_dev, seen.st_ino] = seen.st_blocks * 512
    except OSError as error:
        return {"absent": {"object_store_bytes": error.strerror or str(error)}}
    return {"object_store_bytes": sum(files.values())}
