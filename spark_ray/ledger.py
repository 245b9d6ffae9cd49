"""Observations balanced: total = sum of parts + residual, exact by construction, with an error bar.

Pure: made from observations alone, the host's as the first source and the worker's as the second. Field names are
those of /proc/meminfo; how they are counted was read in Linux (fs/proc/meminfo.c, mm/vmstat.c, mm/vmalloc.c).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from .observation import Ledger, Quantity

Reading = Mapping[str, Any]
"""An observation as a plain dictionary, as `observation.Observation` admits it."""

# Part: its main field, without which there is no such part, then what is added and taken away. No page is in two
# parts. Left out on purpose: Active, Inactive, Unevictable, Mlocked, Mapped, Dirty, AnonHugePages and their like
# (other views of the same pages), KernelStack (see `_kernel`), Bounce and NFS_Unstable (0 on any recent kernel).
_PARTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "free": ("MemFree", (), ()),
    # Cached, Buffers and SwapCached are one counter, cut in three; shared memory is kept in files of tmpfs, in Cached.
    "page_cache": ("Cached", ("Buffers", "SwapCached"), ("Shmem",)),
    "shared_memory": ("Shmem", (), ()),
    "anonymous": ("AnonPages", (), ()),
    # Other reclaimable kernel memory is KReclaimable - SReclaimable; the latter is in Slab already.
    "kernel": ("Slab", ("PageTables", "SecPageTables", "Percpu", "Zswap", "KReclaimable"), ("SReclaimable",)),
    # Pages of the pool, used or not: taken out of the allocator when reserved, in no other counter.
    "huge_pages": ("Hugetlb", (), ()),
}
PARTS = ("free", "per_cpu_free", *list(_PARTS)[1:])
# Counters kept by node with a batch on each CPU that are in the sum: file pages, anonymous, both slabs, both kinds of
# page tables, other reclaimable. Shmem is added and taken away; vmalloc, Percpu and Hugetlb are exact.
_BATCHED = 7
_LISTS = ("Active", "Inactive", "Unevictable")
_MIB = 1 << 20
_STILL_BYTES = _MIB  # what a worker that waits may move between two readings
# Anonymous memory of the guest's first process: in its group, not in the worker's tree. 4.5 MiB where it was measured.
_SUPERVISOR_BYTES = 8 * _MIB


def balance(observation: Reading, *, drivers: bool | None = None, error: int | None = None) -> dict[str, Any]:
    """The ledger of one observation.

    `drivers`: whether the residual is the GPU driver's; None: as the observation says.
    `error`: an error bar known otherwise, for an observation that has none.
    """
    info: Mapping[str, int] = observation["meminfo"]
    absent: dict[str, str] = {}
    notes: list[str] = []
    parts: dict[str, int] = {}
    for name in PARTS:
        value = _waiting(observation, absent) if name == "per_cpu_free" else _part(name, info, absent)
        if value is not None:
            parts[name] = value
    if info.get("Balloon"):
        notes.append(
            f"{info['Balloon']} bytes are in a balloon; whether MemTotal has them the kernel does not say"
        )
    total = info.get("MemTotal")
    if total is None:
        absent["total"] = "MemTotal is not in meminfo"
    terms = {"given": error} if error is not None else _error_terms(observation, notes)
    twice = _user_memory(info, observation, terms)
    if error is None and twice:
        # Pages on their way from one counter to the next, such as those of a process that ends.
        terms["in_flight"] = twice[0].difference_bytes
    residual = None if total is None else total - sum(parts.values())
    is_drivers = unified([observation]) if drivers is None else drivers
    return Ledger(
        phase=observation["phase"],
        total_bytes=total,
        parts=parts,
        residual_bytes=residual,
        driver_bytes=residual if is_drivers else None,
        error_bytes=sum(terms.values()),
        error_terms=terms,
        quantities=twice,
        notes=notes,
        absent=absent or None,
    ).model_dump(exclude_none=True)


def ledgers(inside: Iterable[Reading], outside: Iterable[Reading]) -> list[dict[str, Any]]:
    """One ledger per observation of the host, with the worker's observation of that phase as the second source."""
    inside, outside = list(inside), list(outside)
    drivers = unified([*inside, *outside])
    waiting: defaultdict[str, list[Reading]] = defaultdict(list)
    for seen in inside:
        waiting[seen["phase"]].append(seen)
    first = outside[0] if outside and outside[0]["phase"] == "before_launch" else None
    driver_group = _group(first)[0] if first else None
    drivers_own = _drivers_own(first) if first else 0
    found = []
    for seen in outside:
        same = waiting[seen["phase"]]
        second = same.pop(0) if same else None
        ledger = balance(seen, drivers=drivers)
        own_group = _group(seen)[0] not in {None, driver_group} and driver_group is not None
        more = [
            *_told_twice(seen, second or {}, ledger, group=_group(seen)[1] if own_group else {}),
            *_driver(seen, (second or {}).get("cuda") or {}, ledger, drivers_own),
        ]
        ledger["quantities"] += [each.model_dump(exclude_none=True) for each in more]
        found.append(ledger)
    return found


def unified(observations: Iterable[Reading]) -> bool:
    """Whether the GPU has no memory of its own: NVML supports no memory question, or CUDA's total is MemTotal."""
    for seen in observations:
        cuda = seen.get("cuda") or {}
        if cuda.get("total_bytes") is not None and cuda["total_bytes"] == seen["meminfo"].get("MemTotal"):
            return True
        for gpu in seen.get("gpus") or []:
            if "Not Supported" in (gpu.get("absent") or {}).get("memory_total_bytes", ""):
                return True
    return False


# ---- parts and error --------------------------------------------------------------------------------------


def _part(name: str, info: Mapping[str, int], absent: dict[str, str]) -> int | None:
    main, added, taken = _PARTS[name]
    if main not in info:
        absent[name] = f"the kernel has no {main}"
        return None
    for field in (*added, *taken):
        if field not in info:
            absent[field] = "the kernel has no such field"
    if name == "kernel":
        return info[main] + _kernel(info)
    return info[main] + sum(info.get(each, 0) for each in added) - sum(info.get(each, 0) for each in taken)


def _waiting(observation: Reading, absent: dict[str, str]) -> int | None:
    waiting: int | None = observation.get("per_cpu_free_bytes")
    if waiting is None:
        absent["per_cpu_free"] = (observation.get("absent") or {}).get("per_cpu_free_bytes", "not read")
    return waiting


def _kernel(info: Mapping[str, int]) -> int:
    """What the kernel holds beyond slabs.

    Stacks are taken from vmalloc (CONFIG_VMAP_STACK, the default of x86-64 and arm64), so KernelStack is in
    VmallocUsed; before Linux 5.3 that is always 0, and stacks count by themselves. Percpu holds a little that was
    reserved at boot and is not in MemTotal: below 1 MiB here.
    """
    other = ("PageTables", "SecPageTables", "Percpu", "Zswap")
    reclaimable = max(0, info["KReclaimable"] - info.get("SReclaimable", 0)) if "KReclaimable" in info else 0
    vmalloc = max(info.get("VmallocUsed", 0), info.get("KernelStack", 0))
    return vmalloc + reclaimable + sum(info.get(each, 0) for each in other)


def _error_terms(observation: Reading, notes: list[str]) -> dict[str, int]:
    terms: dict[str, int] = {}
    steadiness, batches = observation.get("steadiness"), observation.get("batches")
    if steadiness:
        terms["spread"] = steadiness["spread_bytes"]
        if not steadiness["agreed"]:
            notes.append(f"the counters did not hold still in {steadiness['tries']} readings")
    else:
        notes.append("the counters were read once: their spread is not known")
    if batches:
        terms["batches"] = batches["free_bytes"] + _BATCHED * batches["counter_bytes"]
    else:
        notes.append("how far the kernel's counters lag behind is not known: /proc/zoneinfo does not say")
    if cached := observation["meminfo"].get("SwapCached"):
        terms["swap_cache"] = abs(cached)  # a page of the swap cache that is mapped is in AnonPages as well
    return terms


# ---- what more than one source tells ----------------------------------------------------------------------


def _quantity(name: str, values: Mapping[str, int | None], why: str, bar: int | None) -> list[Quantity]:
    """The first source that has a value is used; nothing where there are not two."""
    known = {source: value for source, value in values.items() if value is not None}
    if len(known) < 2:
        return []
    difference = max(known.values()) - min(known.values())
    agree = None if bar is None else difference <= bar
    return [
        Quantity(
            name=name, values=known, used=next(iter(known)), why=why, difference_bytes=difference, bar_bytes=bar, agree=agree
        )
    ]  # fmt: skip


def _user_memory(info: Mapping[str, int], observation: Reading, terms: Mapping[str, int]) -> list[Quantity]:
    """Page cache, shared and anonymous memory by kind, and once more by the lists that reclaim walks."""
    if not {"Cached", "AnonPages", *_LISTS} <= info.keys():
        return []
    kinds = sum(info.get(each, 0) for each in ("Cached", "Buffers", "SwapCached", "AnonPages"))
    lag = (observation.get("batches") or {}).get("counter_bytes", 0)
    bar = sum(terms.values()) + len(_LISTS) * lag
    values = {"by kind": kinds, "by reclaim list": sum(info[each] for each in _LISTS)}
    why = "only the kinds tell page cache from anonymous; pages that are being isolated are on no list"
    return _quantity("user_memory", values, why, bar)


def _group(seen: Reading) -> tuple[str | None, Mapping[str, Any]]:
    group: Mapping[str, Any] = seen.get("cgroup") or {}
    return group.get("path"), group


def _told_twice(
    seen: Reading, inside: Reading, ledger: dict[str, Any], group: Mapping[str, Any]
) -> list[Quantity]:
    """What the host's reading, the worker's, and the guest's own group tell more than once; empty: it has none."""
    cuda = inside.get("cuda") or {}
    tree, tree_inside = seen.get("tree") or {}, inside.get("tree") or {}
    files = group.get("file_bytes")
    files = (
        None if files is None else files - (group.get("shmem_bytes") or 0)
    )  # shared memory is kept in files
    return [
        *_quantity(
            "total",
            {
                "MemTotal outside": seen["meminfo"].get("MemTotal"),
                "MemTotal inside": (inside.get("meminfo") or {}).get("MemTotal"),
                "CUDA total": cuda.get("total_bytes") if "driver_bytes" in ledger else None,
            },
            "the kernel's own; a container may be shown another /proc/meminfo",
            0,
        ),
        *_free(seen, inside, ledger),
        *_quantity(
            "guest_anonymous",
            {
                "process tree outside": tree.get("pss_anon_bytes"),
                "process tree inside": tree_inside.get("pss_anon_bytes"),
                "cgroup": group.get("anon_bytes"),
            },
            "counted page by page; the group has the guest's first process as well, and its counters lag behind",
            _STILL_BYTES + (_SUPERVISOR_BYTES + _lag(seen) if group else 0),
        ),
        *_quantity(
            "guest_file_pages",
            {"process tree outside": tree.get("pss_file_bytes"), "cgroup": files},
            "the tree has what is mapped; the group has what it touched first, mapped or not",
            None,
        ),
        *_quantity(
            "model_files",
            {
                "resident": (inside.get("model_files") or {}).get("resident_bytes"),
                "cgroup": files,
            },
            "asked file by file; a group is charged for what it touched first, and cannot say of which file",
            None,
        ),
    ]


def _lag(seen: Reading) -> int:
    return int((seen.get("batches") or {}).get("counter_bytes", 0))


def _free_bytes(seen: Reading) -> int | None:
    free: int | None = (seen.get("meminfo") or {}).get("MemFree")
    return None if free is None else free + (seen.get("per_cpu_free_bytes") or 0)


def _free(seen: Reading, inside: Reading, ledger: Mapping[str, Any]) -> list[Quantity]:
    """MemFree as the worker read it and, on unified memory, CUDA's. What moved between the two sides may differ as well."""
    if "driver_bytes" not in ledger:
        return []
    here, there = _free_bytes(seen), _free_bytes(inside)
    moved = abs(here - there) if here is not None and there is not None else 0
    values = {
        "MemFree inside": (inside.get("meminfo") or {}).get("MemFree"),
        "CUDA free": (inside.get("cuda") or {}).get("free_bytes"),
    }
    why = "CUDA's is read a moment earlier; on unified memory it is MemFree"
    return _quantity("free", values, why, ledger["error_bytes"] + moved)


def _nvml_bytes(seen: Reading) -> int | None:
    """Sum over all processes of all devices. An empty list is no 0: in a PID namespace of our own it is always empty."""
    used = [each.get("used_bytes") for gpu in seen.get("gpus") or [] for each in gpu.get("processes") or []]
    return sum(used) if used and None not in used else None


def _drivers_own(before: Reading) -> int:
    """What no process asked for, as seen before the launch: in the residual and not in NVML's list."""
    return max(0, (balance(before).get("residual_bytes") or 0) - (_nvml_bytes(before) or 0))


def _driver(
    seen: Reading, cuda: Mapping[str, Any], ledger: Mapping[str, Any], drivers_own: int
) -> list[Quantity]:
    """What the driver holds: of the host's memory on unified memory, else of the one device's own."""
    gpus = seen.get("gpus") or []
    values: dict[str, int | None]
    if "driver_bytes" in ledger:
        values = {"residual": ledger["driver_bytes"], "NVML, all processes": _nvml_bytes(seen)}
        why = "the residual has all of it; NVML has no more than processes asked for"
        return _quantity("driver", values, why, ledger["error_bytes"] + drivers_own)
    if len(gpus) != 1 or not cuda:
        return []
    values = {
        "CUDA total - free": cuda["total_bytes"] - cuda["free_bytes"],
        "NVML used": gpus[0].get("memory_used_bytes"),
    }
    reserve = (gpus[0].get("memory_total_bytes") or cuda["total_bytes"]) - cuda["total_bytes"]
    why = "what the engine sees; NVML counts the driver's reserve as used, which CUDA leaves out of its total"
    return _quantity("device_used", values, why, abs(reserve) + _STILL_BYTES)
