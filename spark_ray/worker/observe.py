"""One instrument for both sides: reads memory counters of /proc and the cgroup tree.

All sizes are bytes. A counter that a kernel lacks, or that may not be read here, is absent from the result and its
reason is in `absent`: never 0. The roots are parameters, so that recorded trees can be read as well.
Costs on a 2-core virtual machine: an observation without the tree 0.4 ms, half of it the counters (twice), a quarter a
cgroup; smaps_rollup 2.5 ms per resident GiB; residency of a file 0.1 ms by cachestat, 15 ms per 2 GiB by mincore.
"""

from __future__ import annotations

import os
import re
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .residency import files_under, resident, resident_bytes

__all__ = [
    "CGROUP", "PROC", "batches", "cgroup", "cgroup_path", "descendants", "files_under", "meminfo", "observe",
    "per_cpu_free_bytes", "pressure", "resident", "resident_bytes", "smaps", "steady", "swap_traffic", "tree",
]  # fmt: skip

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_PER_CPU_COUNT = re.compile(r" count: +(\d+)")  # only pagesets have a "count:"
_THRESHOLD = re.compile(r"vm stats threshold: (\d+)")
_FIELD = re.compile(r"(\S+): *(\d+)( kB)?")
_SWAPPED = re.compile(r"(pswpin|pswpout) (\d+)")
_MEM_FREE = re.compile(r"MemFree: +(\d+) kB")
_V1_UNLIMITED = 1 << 60  # v1 writes "no limit" as the largest page-aligned 63-bit number
_TRIES = 3
# Two readings that agree: of 2000 pairs on a 2-core machine 99 % did when it was idle, 90 % beside a program that
# writes files or takes and frees memory as fast as it can.
_TOLERANCE_BYTES = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _text(path: Path | str) -> str:
    """A whole small file of the kernel, in a third of the time of `Path.read_text`."""
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123
        return stream.readall().decode(errors="replace")  # a process may name itself in any bytes


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def meminfo(proc: Path = PROC) -> dict[str, int]:
    """Every field of /proc/meminfo, in bytes (the kernel's "kB" are KiB); HugePages_* stay counts."""
    return _fields(_text(proc / "meminfo"))


def _fields(text: str) -> dict[str, int]:
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in _FIELD.findall(text)}


def _waiting_bytes(zoneinfo: str) -> int:
    return _PAGE * sum(map(int, _PER_CPU_COUNT.findall(zoneinfo)))


def per_cpu_free_bytes(proc: Path = PROC) -> int:
    """Free pages waiting in per-CPU lists: in no meminfo counter, given back slowly (sum of zoneinfo pagesets)."""
    return _waiting_bytes(_text(proc / "zoneinfo"))


def batches(zoneinfo: str) -> dict[str, int]:
    """The most that the kernel's counters may lag behind: each CPU keeps up to a threshold of pages to itself.

    free_bytes: of MemFree, which is kept by zone. counter_bytes: of any counter kept by node (page cache, anonymous,
    slab ...), where a CPU's threshold is the largest of the node's zones (mm/vmstat.c, refresh_zone_stat_thresholds).
    """
    zones: dict[str, list[list[int]]] = {}
    for section in zoneinfo.split("Node ")[1:]:
        thresholds = list(map(int, _THRESHOLD.findall(section)))
        zones.setdefault(section.partition(",")[0], []).append(thresholds)
    free = sum(sum(zone) for node in zones.values() for zone in node)
    other = sum(sum(map(max, zip_longest(*node, fillvalue=0))) for node in zones.values())
    return {"free_bytes": free * _PAGE, "counter_bytes": other * _PAGE} if free else {}


def steady(proc: Path = PROC) -> dict[str, Any]:
    """`meminfo` with the per-CPU lists of the same moment, read until two readings agree, three times at most.

    What must agree is MemFree plus the lists: what is freed moves from one to the other. The last reading is kept.
    """
    seen: list[int] = []
    values: dict[str, Any] = {}
    agreed, text, zoneinfo = False, "", ""
    while len(seen) < _TRIES and not agreed:
        text = _text(proc / "meminfo")
        try:
            zoneinfo = _text(proc / "zoneinfo")
            values["per_cpu_free_bytes"] = _waiting_bytes(zoneinfo)
        except OSError as error:
            values["absent"] = {"per_cpu_free_bytes": _why(error)}
        free = _MEM_FREE.search(text)
        seen.append(values.get("per_cpu_free_bytes", 0) + (int(free[1]) * 1024 if free else 0))
        agreed = len(seen) > 1 and abs(seen[-1] - seen[-2]) <= _TOLERANCE_BYTES
    counted = seen[-2:] if agreed else seen
    spread = max(counted) - min(counted)
    values["meminfo"] = _fields(text)
    values["steadiness"] = {"tries": len(seen), "spread_bytes": spread, "agreed": agreed}
    if lag := batches(zoneinfo):
        values["batches"] = lag
    return values


def swap_traffic(proc: Path = PROC) -> dict[str, int]:
    """Bytes read from and written to swap since boot. Raises OSError or KeyError where the kernel does not say."""
    pages = dict(_SWAPPED.findall(_text(proc / "vmstat")))
    return {"in_bytes": int(pages["pswpin"]) * _PAGE, "out_bytes": int(pages["pswpout"]) * _PAGE}


def _limited(text: str) -> int | None:
    """A limit in bytes; None where it says that there is none."""
    return None if text == "max" or int(text) >= _V1_UNLIMITED else int(text)


def _number(path: str, name: str, values: dict[str, Any], absent: dict[str, str]) -> None:
    try:
        value = _limited(_text(path).strip())
    except (OSError, ValueError) as error:
        absent[name] = _why(error) if isinstance(error, OSError) else str(error)
        return
    if value is None:
        absent[name] = "unlimited"
    else:
        values[name] = value


def _table(path: str, name: str, values: dict[str, Any], absent: dict[str, str]) -> None:
    try:
        pairs = [line.split() for line in _text(path).splitlines()]
    except OSError as error:
        absent[name] = _why(error)
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


_V1_FILES = {
    "usage_bytes": "memory.usage_in_bytes",
    "peak_bytes": "memory.max_usage_in_bytes",
    "limit_bytes": "memory.limit_in_bytes",
    "memory_and_swap_limit_bytes": "memory.memsw.limit_in_bytes",
}
_V2_FILES = {
    "usage_bytes": "memory.current",
    "peak_bytes": "memory.peak",
    "limit_bytes": "memory.max",
    "swap_usage_bytes": "memory.swap.current",
    "swap_limit_bytes": "memory.swap.max",
}
_V1_STAT = {"anon_bytes": "total_rss", "file_bytes": "total_cache", "shmem_bytes": "total_shmem"}
_V1_STAT |= {"swap_usage_bytes": "total_swap"}
_V2_STAT = {"anon_bytes": "anon", "file_bytes": "file", "shmem_bytes": "shmem"}


def cgroup(pid: int | str = "self", proc: Path = PROC, root: Path = CGROUP) -> dict[str, Any]:
    """Memory accounting of the group of `pid`, cgroup v1 or v2, under the same names for both.

    usage and peak include page cache; anon does not. In a container the group's own files are at the mount's top.
    """
    absent: dict[str, str] = {}
    try:
        version, path = cgroup_path(pid, proc)
    except OSError as error:
        return {"absent": {"cgroup": _why(error)}}
    values: dict[str, Any] = {"version": version, "path": path}
    top = root / "memory" if version == 1 else root
    folder = top / path.lstrip("/")
    if path.startswith("/..") or not folder.is_dir():  # of another cgroup namespace, or not mounted here
        folder = top
        values["seen_at"] = "mount top"
    for name, file in (_V1_FILES if version == 1 else _V2_FILES).items():
        _number(f"{folder}/{file}", name, values, absent)
    _table(f"{folder}/memory.stat", "stat", values, absent)
    events = "memory.oom_control" if version == 1 else "memory.events"
    _table(f"{folder}/{events}", "events", values, absent)
    stat = values.get("stat", {})
    for name, key in (_V1_STAT if version == 1 else _V2_STAT).items():
        if key in stat:
            values[name] = stat[key]
    _effective_limit(top, folder, values, absent)
    if absent:
        values["absent"] = absent
    return values


def _effective_limit(top: Path, folder: Path, values: dict[str, Any], absent: dict[str, str]) -> None:
    """What really bounds the group: the smallest limit of it and all groups above it, and where that was found."""
    limit, where = None, ""
    if values["version"] == 1:
        limit = values.get("stat", {}).get("hierarchical_memory_limit")
        if limit is None:
            absent["effective_limit_bytes"] = "memory.stat has no hierarchical_memory_limit"
            return
        limit = _limited(str(limit))
        where = "hierarchical_memory_limit"  # the kernel's own minimum: it does not say whose
    else:
        for group in [folder, *folder.parents]:
            try:
                found = _limited(_text(group / "memory.max").strip())
            except (OSError, ValueError):  # the root group has no such file
                found = None
            if found is not None and (limit is None or found < limit):
                limit, where = found, "/" + str(group.relative_to(top)).strip(".")
            if group == top:
                break
    if limit is None:
        unseen = values["version"] == 2 and values.get("seen_at") is not None
        absent["effective_limit_bytes"] = (
            "unlimited as far as seen: groups above the mount's top are hidden" if unseen else "unlimited"
        )
    else:
        values |= {"effective_limit_bytes": limit, "effective_limit_at": where}


def pressure(proc: Path = PROC) -> dict[str, float] | None:
    """Total microseconds that some / all tasks stalled for memory since boot; None where the kernel has no PSI."""
    try:
        return _stalled(proc)
    except OSError:
        return None


def _stalled(proc: Path) -> dict[str, float]:
    lines = _text(proc / "pressure" / "memory").splitlines()
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
            unread = _why(error)
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
    """One timed reading of everything at a named phase. meminfo and the lists come first: the rest costs time."""
    started = time.monotonic()
    values: dict[str, Any] = {"phase": phase, "monotonic_s": started, **steady(proc)}
    absent: dict[str, str] = values.pop("absent", {})
    values["cgroup"] = cgroup(pid, proc, root)
    try:
        values["pressure"] = _stalled(proc)
    except FileNotFoundError:
        absent["pressure"] = "the kernel has no pressure stall information"
    except OSError as error:  # the kernel has it, and it is switched off
        absent["pressure"] = _why(error)
    try:
        values["swap_traffic"] = swap_traffic(proc)
    except OSError as error:
        absent["swap_traffic"] = _why(error)
    except KeyError:
        absent["swap_traffic"] = "the kernel counts no swapping"
    if with_tree:
        values["tree"] = tree(os.getpid() if pid == "self" else int(pid), proc)
    if absent:
        values["absent"] = absent
    values["cost_s"] = time.monotonic() - started
    return values
