"""One instrument for both sides: reads memory counters of /proc and the cgroup tree.

All sizes are bytes. A counter that a kernel lacks, or that may not be read here, is absent from the result and its
reason is in `absent`: never 0. The roots are parameters, so that recorded trees can be read as well.
Costs on a 2-core virtual machine: meminfo 20 us, a cgroup 20 us, zoneinfo 60 us; smaps_rollup 2.5 ms per resident GiB.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_PER_CPU_COUNT = re.compile(r"^ +count: +(\d+)", re.MULTILINE)  # only pagesets have a "count:"
_V1_UNLIMITED = 1 << 60  # v1 writes "no limit" as the largest page-aligned 63-bit number


def _text(path: Path | str) -> str:
    """A whole small file of the kernel, in a third of the time of `Path.read_text`."""
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123
        return stream.readall().decode(errors="replace")  # a process may name itself in any bytes


def meminfo(proc: Path = PROC) -> dict[str, int]:
    """Every field of /proc/meminfo, in bytes (the kernel's "kB" are KiB); HugePages_* stay counts."""
    fields = {}
    for line in _text(proc / "meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words:
            fields[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return fields


def per_cpu_free_bytes(proc: Path = PROC) -> int:
    """Free pages waiting in per-CPU lists: in no meminfo counter, given back slowly (sum of zoneinfo pagesets)."""
    pages = sum(map(int, _PER_CPU_COUNT.findall(_text(proc / "zoneinfo"))))
    return pages * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path, name: str, values: dict[str, Any], absent: dict[str, str]) -> None:
    try:
        text = _text(path).strip()
    except OSError as error:
        absent[name] = error.strerror or str(error)
        return
    if text == "max" or (text.isdigit() and int(text) >= _V1_UNLIMITED):
        absent[name] = "unlimited"
    else:
        values[name] = int(text)


def _table(path: Path, name: str, values: dict[str, Any], absent: dict[str, str]) -> None:
    try:
        pairs = [line.split() for line in _text(path).splitlines()]
    except OSError as error:
        absent[name] = error.strerror or str(error)
        return
    values[name] = {
        pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].lstrip("-").isdigit()
    }


def cgroup_path(pid: int | str, proc: Path = PROC) -> tuple[int, str]:
    """(version, path) of the group that accounts the memory of a process, as that process's cgroup namespace shows it."""
    unified = "/"
    for line in _text(proc / str(pid) / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return 1, path
        if not controllers:
            unified = path
    return 2, unified


def cgroup(pid: int | str = "self", proc: Path = PROC, root: Path = CGROUP) -> dict[str, Any]:
    """Memory accounting of the group of `pid`, cgroup v1 or v2, under the same names for both.

    usage and peak include page cache; anon does not. In a container the group's own files are at the mount's top.
    """
    absent: dict[str, str] = {}
    try:
        version, path = cgroup_path(pid, proc)
    except OSError as error:
        return {"absent": {"cgroup": error.strerror or str(error)}}
    values: dict[str, Any] = {"version": version, "path": path}
    top = root / "memory" if version == 1 else root
    folder = top / path.lstrip("/")
    if not folder.is_dir():
        folder = top
        values["seen_at"] = "mount top"
    v1 = version == 1
    _number(folder / ("memory.usage_in_bytes" if v1 else "memory.current"), "usage_bytes", values, absent)
    _number(folder / ("memory.max_usage_in_bytes" if v1 else "memory.peak"), "peak_bytes", values, absent)
    _number(folder / ("memory.limit_in_bytes" if v1 else "memory.max"), "limit_bytes", values, absent)
    _table(folder / "memory.stat", "stat", values, absent)
    _table(folder / ("memory.oom_control" if v1 else "memory.events"), "events", values, absent)
    stat = values.get("stat", {})
    key = "total_rss" if v1 else "anon"
    if key in stat:
        values["anon_bytes"] = stat[key]
    cache_key = "total_cache" if v1 else "file"
    if cache_key in stat:
        values["file_bytes"] = stat[cache_key]
    if absent:
        values["absent"] = absent
    return values


def pressure(proc: Path = PROC) -> dict[str, float] | None:
    """Total microseconds that some / all tasks stalled for memory since boot; None where the kernel has no PSI."""
    try:
        lines = _text(proc / "pressure" / "memory").splitlines()
    except OSError:
        return None
    return {line.split()[0] + "_total_us": float(line.rsplit("=", 1)[1]) for line in lines}


def smaps(pid: int | str, proc: Path = PROC) -> dict[str, int]:
    """smaps_rollup of one process in bytes: Rss, Pss and their parts. Raises OSError when it may not be read."""
    values = {}
    for line in _text(proc / str(pid) / "smaps_rollup").splitlines()[1:]:
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            values[words[0].rstrip(":")] = int(words[1]) * 1024
    return values


def descendants(pid: int, proc: Path = PROC) -> list[int]:
    """The process and all its descendants now, parents first. A process that ends meanwhile is left out."""
    # Asking each process for its children costs 10 us; looking through all of /proc 40 us a process of the host.
    known = None if (proc / "thread-self" / "children").exists() else _scanned(proc)
    found, queue = [], [pid]
    while queue:
        current = queue.pop(0)
        found.append(current)
        queue += _listed(current, proc) if known is None else known.get(current, [])
    return found


def _listed(pid: int, proc: Path) -> list[int]:
    """What the kernel lists as children, of any thread of the process."""
    found: list[int] = []
    try:
        for task in (proc / str(pid) / "task").iterdir():
            found += map(int, _text(task / "children").split())
    except OSError:
        pass
    return found


def _scanned(proc: Path) -> dict[int, list[int]]:
    """Children by parent, from every process there is: for kernels without the list, and recorded trees."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                stat = _text(entry / "stat")
            except OSError:
                continue
            children.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry.name))
    return children


def tree(pid: int, proc: Path = PROC) -> dict[str, Any]:
    """Proportional set size of a process tree, from smaps_rollup; unreadable members are counted in `absent`."""
    total: dict[str, int] = {}
    members, unread = 0, ""
    for member in descendants(pid, proc):
        try:
            part = smaps(member, proc)
        except OSError as error:
            unread = error.strerror or str(error)
            continue
        members += 1
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    wanted = {
        "Rss": "rss_bytes",
        "Pss": "pss_bytes",
        "Pss_Anon": "pss_anon_bytes",
        "Pss_File": "pss_file_bytes",
        "Pss_Shmem": "pss_shmem_bytes",
    }
    values: dict[str, Any] = {new: total[old] for old, new in wanted.items() if old in total}
    values["processes"] = members
    if unread:
        values["absent"] = {"some_members": unread}
    return values


def observe(
    phase: str, pid: int | str = "self", *, with_tree: bool = True, proc: Path = PROC, root: Path = CGROUP
) -> dict[str, Any]:
    """One timed reading of everything at a named phase. meminfo is read first: the rest costs time."""
    started = time.monotonic()
    values: dict[str, Any] = {"phase": phase, "monotonic_s": started, "meminfo": meminfo(proc)}
    absent = {}
    try:
        values["per_cpu_free_bytes"] = per_cpu_free_bytes(proc)
    except OSError as error:
        absent["per_cpu_free_bytes"] = error.strerror or str(error)
    values["cgroup"] = cgroup(pid, proc, root)
    stalled = pressure(proc)
    if stalled is None:
        absent["pressure"] = "the kernel has no pressure stall information"
    else:
        values["pressure"] = stalled
    if with_tree:
        values["tree"] = tree(os.getpid() if pid == "self" else int(pid), proc)
    if absent:
        values["absent"] = absent
    values["cost_s"] = time.monotonic() - started
    return values
